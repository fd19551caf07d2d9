"""Serves a model whose weights are in S3: vLLM reads them straight into its parameters, and nothing goes to a disk.

    pip install 'engine-loader[s3]' vllm
    python examples/serve_from_s3.py MODEL s3://bucket/prefix --prompt "The capital of France is"

MODEL is a directory with config.json and the tokenizer. Credentials, region and endpoint come from the environment
(AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, ...); see docs/object-storage.md. The server's command line:

    vllm serve MODEL --load-format b10_3fs --model-loader-extra-config '{"weights_uri": "s3://bucket/prefix"}'
"""

import argparse

from vllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("weights")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--max-model-len", type=int, default=256)
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    arguments = parser.parse_args()
    llm = LLM(
        arguments.model,
        load_format="b10_3fs",
        model_loader_extra_config={"weights_uri": arguments.weights},
        max_model_len=arguments.max_model_len,
        enforce_eager=arguments.eager,
    )
    answer = llm.generate([arguments.prompt], SamplingParams(temperature=0, max_tokens=16))[0].outputs[0]
    print(f"{len(answer.token_ids)} tokens: {answer.text!r}")


if __name__ == "__main__":  # vLLM's engine process imports this file again
    main()
