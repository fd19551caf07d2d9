"""Reads parts of a tensor: rows, columns, a list of rows. Only the bytes that an index needs are read.

    python examples/read_slices.py MODEL TENSOR

TENSOR is the name of a matrix in the checkpoint, e.g. model.embed_tokens.weight; `engine-loader inspect MODEL` lists
the names.
"""

import argparse

from engine_loader import open_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tensor")
    arguments = parser.parse_args()
    with open_checkpoint(arguments.model) as checkpoint:
        info = checkpoint.info(arguments.tensor)
        print(
            f"{info.name}: {info.dtype} {list(info.shape)}, {info.nbytes} bytes from byte {info.offset} of {info.file}"
        )
        matrix = checkpoint.get_slice(arguments.tensor)
        rows, columns = info.shape
        parts = {
            "the first half of the rows": matrix[: rows // 2],
            "the second half of the columns": matrix[:, columns // 2 :],
            "the first and the last row": matrix[[0, -1]],
        }
    for what, tensor in parts.items():  # tensors stay valid when the checkpoint is closed
        print(f"{what}: {list(tensor.shape)}, sum {tensor.double().sum().item():.4f}")


if __name__ == "__main__":
    main()
