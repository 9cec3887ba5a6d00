"""Lists the parameters of a model, and counts them by kind.

python -m tools.inspect_params --model_size 3M
"""

if __name__ == "__main__":  # before the slow imports
    import cli

    cli.leave_on_ctrl_c()

import numpy as np

import cli
import utils
from weights.params import flatten

KINDS = {"embeddings": ("wte", "wpe", "lm_head"), "attention": ("attn",), "mlp": ("mlp",)}
KINDS["layer norms"] = ("ln_1", "ln_2", "ln_f")


def table(params):
    """One line for each parameter, then the totals."""
    yield f"{'name':32} {'shape':>16} {'dtype':>8} {'mean':>11} {'std':>11}"
    leaves, sizes = flatten(params), dict.fromkeys(KINDS, 0)
    for path, array in leaves.items():
        name, shape = ".".join(map(str, path)).replace("blocks.", "h"), str([*array.shape])
        mean, std = array.mean(dtype=np.float64), array.std(dtype=np.float64)
        yield f"{name:32} {shape:>16} {array.dtype!s:>8} {mean:11.4e} {std:11.4e}"
        sizes[next(kind for kind, names in KINDS.items() if set(names) & set(path))] += array.size
    total, n_bytes = sum(sizes.values()), sum(array.nbytes for array in leaves.values())
    yield ""
    yield f"{'parameters':12} {total:>14,}   {n_bytes:,} bytes"
    yield from (f"{kind:12} {size:>14,}   {size / total:6.1%}" for kind, size in sizes.items())


def main(model_size: str = "3M", *, models_dir: str = ""):
    """Lists the parameters of a model, with shape, dtype, mean and standard deviation, and counts them by kind.

    Args:
        model_size: 3M, 124M, 355M, 774M, 1558M or a model folder
        models_dir: where the folders of models are; left out, models/ of this repository
    """
    print("\n".join(table(utils.load_encoder_hparams_and_params(model_size, models_dir)[2])))


if __name__ == "__main__":
    cli.run(main, "-m tools.inspect_params")
