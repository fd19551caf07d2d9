"""Which loader SGLang takes for --load-format b10_3fs and a quantisation, and what it says of the model; for tests.

    python loaders.py MODEL QUANTISATION...

Prints a line of JSON behind "LOADERS ": quantisation -> the error, or the loader's name where there was none. Without a
server, for one on a CPU stops before it looks for a loader. Needs SGLang's environment.
"""

import json
import os
import sys


def main(model: str, *quantisations: str) -> None:
    from engine_loader.plugin import register

    register()
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.loader import get_model_loader

    found = {}
    for quantisation in quantisations:
        config = ModelConfig(model)
        config.quantization = quantisation  # on a CPU, its constructor refuses most of them
        try:
            loader = get_model_loader(LoadConfig(load_format="b10_3fs"), config)
            found[quantisation] = type(loader).__name__
            if not os.path.exists(os.path.join(model, "hf_quant_config.json")):  # as ModelOpt leaves it
                loader.load_model(model_config=config, device_config=None)
        except Exception as error:
            found[quantisation] = f"{type(error).__name__}: {error}"
    print("\nLOADERS " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
