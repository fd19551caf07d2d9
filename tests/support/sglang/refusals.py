"""What SGLang's launching process says to options that must not start, in one process; for tests.

    python refusals.py MODEL OPTIONS

OPTIONS is a JSON list of lists of command-line options. Prints a JSON list of the errors behind "REFUSALS ". Each list
is parsed and handed to what starts SGLang's processes, without the arguments that it needs: nothing can start.
"""

import json
import sys


def main(model: str, options: str) -> None:
    from engine_loader.plugin import register

    register()
    from sglang.srt.entrypoints import engine
    from sglang.srt.server_args import prepare_server_args

    # Up to 0.5.9 it was a function of the module.
    launch = (engine if hasattr(engine, "_launch_subprocesses") else engine.Engine)._launch_subprocesses
    errors = []
    for given in json.loads(options):
        try:
            arguments = ["--model-path", model, "--load-format", "b10_3fs", "--device", "cpu", *given]
            launch(prepare_server_args(arguments))
            errors.append("")
        except BaseException as error:  # argparse exits
            errors.append(f"{type(error).__name__}: {error}")
    print("\nREFUSALS " + json.dumps(errors), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
