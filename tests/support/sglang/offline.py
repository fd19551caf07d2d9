"""SGLang's Engine without a server, for tests: loads a model, answers, and may save its state (sharded_state).

    python offline.py MODEL LOAD_FORMAT TOKENS [SAVE_IN]

Prints what it answered to TOKENS (a JSON list) as a line of JSON behind "ANSWER ". Needs SGLang's environment.
"""

import inspect
import json
import sys


def main(model: str, load_format: str, tokens: str, save_in: str | None = None) -> None:
    import sglang

    engine = sglang.Engine(
        model_path=model,
        load_format=load_format,
        device="cpu",
        disable_overlap_schedule=True,
        max_total_tokens=4096,
        max_running_requests=4,
        context_length=256,
        log_level="info",
    )
    sampling = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    answer = engine.generate(input_ids=json.loads(tokens), sampling_params=sampling)
    print("\nANSWER " + json.dumps(answer["text"]), flush=True)
    if save_in is not None:
        options = {"path": save_in, "pattern": None, "max_size": None}
        # Older versions hand the keywords to a method that wants one mapping.
        from sglang.srt.managers.scheduler import Scheduler

        wants_mapping = "params" in inspect.signature(Scheduler.save_sharded_model).parameters
        engine.save_sharded_model(**({"params": options} if wants_mapping else options))
    engine.shutdown()


if __name__ == "__main__":  # its processes are spawned, and import this file
    main(*sys.argv[1:])
