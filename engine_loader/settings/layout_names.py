"""Names of trainings' layouts that ``loader.key_mapping`` takes; loading/mapping/named_layouts.py has their meaning."""

import re

LAYOUT_NAME = re.compile(
    r"(torchtitan-llama|meta-llama|torchtune-llama)(?::([0-9]{1,5}))?|torchtitan-(?:llama4|qwen3|deepseek_v3)"
)
"""The first group is there for those whose rows are reordered, the second for the rows of a head, as in ``:128``."""
