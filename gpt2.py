"""GPT-2 from the smallest part to the whole. Read from top to bottom: each function uses only what stands above it.

A language model is a function: token ids go in, and for each of them come out n_vocab scores (logits), one for every
token that might stand next. To write, take the best one, append it, and ask again. That is all of `generate`.

The parameters are a nested dict with the names of OpenAI's checkpoint, so `**params` *is* the call (checkpoint.py reads
it, encoder.py turns text into ids and back). The arrays decide who computes, NumPy or JAX (backends/__init__.py).

Sizes          n_seq tokens at hand, n_ctx at most; n_vocab known tokens; n_embd numbers stand for one token;
               n_layer blocks; n_head heads of d_head = n_embd / n_head numbers each.
Shapes         `# [in] -> [out]` ends every line that changes a shape.
Dtypes         what goes in comes out: float32, float64 or bfloat16 (@keeps_dtype, @in_float32: for the last alone,
               read over them). Scalars are Python's: a NumPy float64 would turn every float32 it touches into float64.
[GPT-2]        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"
[Transformer]  Vaswani et al. 2017, "Attention Is All You Need"
"""

if __name__ == "__main__":  # run as a program: find the other files even under python -P, and take care of Ctrl-C
    import sys

    sys.path.insert(0, __file__.removesuffix("gpt2.py"))
    import cli

    cli.leave_on_ctrl_c()

import math

from backends import in_float32, keeps_dtype, np

# ---- The parts ----


@keeps_dtype
@in_float32
def gelu(x):
    """For x of any shape: lets positive numbers through, mutes negative ones (Hendrycks & Gimpel 2016, section 2).

    The tanh form, not the exact one with erf: GPT-2 was trained with it, and the two differ by up to 5e-4.
    """
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


@keeps_dtype
@in_float32
def softmax(x):
    """Scores [..., n] to as many probabilities: positive, and summing to 1 along the last axis."""
    # A shift common to all scores changes nothing, and below a maximum of 0 no exp can overflow.
    exp_x = np.exp(x - x.max(axis=-1, keepdims=True))
    return exp_x / exp_x.sum(axis=-1, keepdims=True)


@keeps_dtype
@in_float32
def layer_norm(x, g, b, eps=1e-5):
    """Each vector of x, [..., n_embd], to mean 0 and variance 1, then scaled by g and shifted by b, both [n_embd]
    (Ba et al. 2016, section 3). eps keeps a constant vector from being divided by zero."""
    centred = x - x.sum(axis=-1, keepdims=True) / x.shape[-1]
    variance = (centred * centred).sum(axis=-1, keepdims=True) / x.shape[-1]  # [..., n_embd] -> [..., 1]
    return g * (centred / np.sqrt(variance + eps)) + b


@keeps_dtype
def linear(x, w, b):
    """w is [n_in, n_out] as in the checkpoint, b is [n_out]."""
    return x @ w + b  # [..., n_in] -> [..., n_out]


# ---- The block: each token looks at those before it (mha), then thinks for itself (ffn) ----


@keeps_dtype
def attention_scores(q, k):
    """Tokens tell each other what they know. Each asks (its query, a row of q), says what it has (its key, a row of k)
    and brings it (its value). This is how well each key matches each query ([Transformer] section 3.2.1)."""
    # A sum of d_head random products grows like sqrt(d_head). Divide that away, or softmax would heed one key alone.
    return q / math.sqrt(q.shape[-1]) @ k.mT  # [..., n_query, d_head] -> [..., n_query, n_key]


@keeps_dtype
def attention(q, k, v, mask):
    """Each query gets a mean of the values, weighted by the scores of their keys ([Transformer] section 3.2.1).

    q is [..., n_query, d_head]; k and v are [..., n_key, d_head].
    mask is boolean, [n_query, n_key]: True where that query may look at that key.
    """
    scores = attention_scores(q, k)  # [..., n_query, d_head] -> [..., n_query, n_key]
    # -1e10 is OpenAI's stand-in for minus infinity: far below any score, so softmax makes it exactly 0, and never NaN.
    weights = softmax(np.where(mask, scores, scores.dtype.type(-1e10)))
    return weights @ v  # [..., n_query, n_key] -> [..., n_query, d_head]


def split_heads(x, n_head):
    """Cuts each vector into n_head pieces; the heads then are an axis, and one product serves them all."""
    n_seq, n_embd = x.shape
    return x.reshape(n_seq, n_head, n_embd // n_head).swapaxes(0, 1)  # [n_seq, n_embd] -> [n_head, n_seq, d_head]


def merge_heads(x):
    """Undoes split_heads."""
    n_head, n_seq, d_head = x.shape
    return x.swapaxes(0, 1).reshape(n_seq, n_head * d_head)  # [n_head, n_seq, d_head] -> [n_seq, n_embd]


def mha(x, c_attn, c_proj, n_head):
    """Multi-head causal self-attention ([Transformer] section 3.2.2): n_head small attentions side by side, each free
    to look for something else. c_attn makes queries, keys and values of x in one product."""
    qkv = linear(x, **c_attn)  # [n_seq, n_embd] -> [n_seq, 3*n_embd]
    q, k, v = np.split(qkv, 3, axis=-1)  # [n_seq, 3*n_embd] -> 3 of [n_seq, n_embd]
    q, k, v = (split_heads(part, n_head) for part in (q, k, v))  # [n_seq, n_embd] -> [n_head, n_seq, d_head]
    # Causal: row i is True up to column i. A token that saw its successors would have nothing left to predict.
    mask = np.tri(len(x), dtype=bool)  # -> [n_seq, n_seq]
    x = merge_heads(attention(q, k, v, mask))  # [n_head, n_seq, d_head] -> [n_seq, n_embd]
    return linear(x, **c_proj)


def ffn(x, c_fc, c_proj):
    """The position-wise feed-forward network ([Transformer] section 3.3): each row by itself, four times as wide."""
    a = gelu(linear(x, **c_fc))  # [n_seq, n_embd] -> [n_seq, 4*n_embd]
    return linear(a, **c_proj)  # [n_seq, 4*n_embd] -> [n_seq, n_embd]


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head):
    """x is [n_seq, n_embd] and stays so: both parts add to it. Layer norm comes before each part, not after it as in
    [Transformer], and once more after the last block ([GPT-2] section 2.3)."""
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head)
    return x + ffn(layer_norm(x, **ln_2), **mlp)


# ---- The whole ----


def embed(inputs, wte, wpe):
    """What each token is (its row of wte) plus where it stands (row 0, 1, 2, ... of wpe)."""
    return wte[np.asarray(inputs)] + wpe[: len(inputs)]  # [n_seq] -> [n_seq, n_embd]


@keeps_dtype
def unembed(x, wte):
    """How well x matches each token, by the very vectors that tokens came in as (Press & Wolf 2017)."""
    return x @ wte.T  # [..., n_embd] -> [..., n_vocab]


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head):
    """The logits: row i scores the candidates for position i + 1 ([GPT-2] section 2.3).

    inputs are [n_seq] ids; wte is [n_vocab, n_embd], wpe [n_ctx, n_embd]; blocks and ln_f hold the arguments of the
    functions above. Ids are not checked here, where they may be traced and have no value yet: see check_inputs.
    """
    x = embed(inputs, wte, wpe)  # [n_seq] -> [n_seq, n_embd]
    for block in blocks:
        x = transformer_block(x, **block, n_head=n_head)
    return unembed(layer_norm(x, **ln_f), wte)  # [n_seq, n_embd] -> [n_seq, n_vocab]


def check_inputs(inputs, n_new, n_vocab, n_ctx):
    """Raises ValueError unless all ids are in the vocabulary and the prompt and n_new more fit into n_ctx. Asked once,
    up front: NumPy would take id -1 for the last row, JAX any id too large for the last one."""
    n_seq = len(inputs)
    if n_seq == 0 or n_new < 0:
        raise ValueError(f"{n_seq} input ids and {n_new} new tokens: there must be at least 1 and at least 0")
    if n_seq + n_new > n_ctx:
        raise ValueError(
            f"prompt {n_seq} + {n_new} new = {n_seq + n_new} tokens > n_ctx {n_ctx}, all that this model can see: "
            f"shorten the prompt or generate at most {max(n_ctx - n_seq, 0)}"
        )
    if bad := [i for i in inputs if not 0 <= i < n_vocab]:
        raise ValueError(f"token id {bad[0]} is outside the vocabulary: ids go from 0 to {n_vocab - 1}")


def generate(inputs, params, n_head, n_tokens_to_generate):
    """The list of ids that follows the list `inputs`, the likeliest one each time. `inputs` stays as it is.

    The loop to read, not the fast one: for each new token all earlier ones pass through the model again.
    Raises ValueError as check_inputs does.
    """
    check_inputs(inputs, n_tokens_to_generate, n_vocab=len(params["wte"]), n_ctx=len(params["wpe"]))
    ids = list(inputs)
    for _ in range(n_tokens_to_generate):
        logits = gpt2(ids, **params, n_head=n_head)  # [n_seq] -> [n_seq, n_vocab]
        ids.append(int(np.argmax(logits[-1])))  # [n_vocab] -> one id
    return ids[len(inputs) :]


# ---- The front door: python gpt2.py "prompt" ----


def main(prompt="", **flags):
    """Prints how the prompt goes on. The flags are those of inference/__main__.py, where the faster loop is."""
    from inference.__main__ import main as front_door

    front_door(prompt, **flags)


if __name__ == "__main__":
    from inference.__main__ import main as front_door

    cli.run(front_door, "gpt2.py")
