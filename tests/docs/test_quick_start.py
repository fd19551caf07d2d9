"""make test-quick-start finds what it looks for in docs/quick-start.md: that takes minutes, this does not."""

from scripts.try_quick_start import DOCUMENT, EXPECTED, IN_LOGS, VLLM, steps


def test_every_start_and_every_expected_line_is_in_the_document() -> None:
    found = steps(DOCUMENT.read_text())
    lines = [step.text for step in found if step.language == "sh"]
    assert set(EXPECTED) <= set(lines)
    assert sum(line.startswith(VLLM) for line in lines) == len(IN_LOGS)
    assert sum(step.language == "python" for step in found) == 2
    assert sum(line.startswith("curl ") for line in lines) == 1
