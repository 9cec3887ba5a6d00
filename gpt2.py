"""GPT-2 from its smallest function to the whole model. Read from top to bottom: each function uses only those above it.

A language model is a function. Its input is a text as a list of token ids (encoder.py turns text into ids and back).
Its output is, for each position, n_vocab numbers called logits: one score for every token of the vocabulary, high if
that token is likely to come next. To generate text, take the best-scoring token after the last position, append it to
the input, and call the function again. That loop is `generate`, near the end of this file.

The model is a stack of blocks of the same form, each with its own parameters. Each token is represented by a vector of
n_embd numbers; a block reads these vectors and adds to them. Attention (mha) moves information between positions, the
feed-forward network (ffn) transforms each position by itself.

The parameters (weights) are a nested dict with the names of OpenAI's checkpoint, so a function of the model is called
as `layer_norm(x, **ln_1)`: the keys of the dict are the names of the arguments. weights/tensorflow.py reads the files.

Shapes         `# [in] -> [out]` at the end of a line gives the shape before and after it; `...` is any number of axes.
               n_seq: tokens in the input, at most n_ctx; n_vocab: tokens in the vocabulary; n_embd: numbers that
               represent one token; n_layer blocks; n_head heads of d_head = n_embd / n_head numbers each.
Libraries      `np` computes with NumPy or JAX, whichever the arrays belong to: see backends/__init__.py.
Dtypes         float32, float64 or bfloat16: the result has the dtype of the input. `@keeps_dtype` makes this true for
               bfloat16; for the other two it changes no result: skip it on a first reading. Constants are Python
               floats, as a NumPy float64 would turn every float32 array that it meets into float64.

[GPT-2]        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"
[Transformer]  Vaswani et al. 2017, "Attention Is All You Need"
The names and signatures follow Jay Mody's article "GPT in 60 Lines of NumPy" (2023) and his picoGPT.
"""

if __name__ == "__main__":  # run as a program: Ctrl-C ends it from here on, even while NumPy is being imported
    import sys

    sys.path.insert(0, __file__.removesuffix("gpt2.py"))  # with python -P this folder is not on the path
    import cli

    cli.leave_on_ctrl_c()

import math

from backends import keeps_dtype, np

# ---- Functions of a vector ----


@keeps_dtype(compute="float32")
def gelu(x):
    """The Gaussian error linear unit, the nonlinearity of the feed-forward network, for x of any shape: close to x for
    large positive numbers, close to 0 for large negative ones (Hendrycks & Gimpel 2016, section 2).

    This is the approximation with tanh, not the exact form with erf: GPT-2 was trained with it, and the two differ by
    up to 5e-4.
    """
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


@keeps_dtype(compute="float32")
def softmax(x):
    """Scores [..., n] -> probabilities [..., n]: positive, with sum 1 along the last axis. exp turns differences of
    scores into ratios: softmax of (0, ln 2, ln 5) is (1/8, 2/8, 5/8)."""
    # Subtracting the same number from all scores changes no ratio, and with a maximum of 0 no exp can overflow.
    exp_x = np.exp(x - x.max(axis=-1, keepdims=True))
    return exp_x / exp_x.sum(axis=-1, keepdims=True)


@keeps_dtype(compute="float32")
def layer_norm(x, g, b, eps=1e-5):
    """Layer normalization (Ba et al. 2016, section 3): each vector of x, [..., n_embd], is shifted and scaled to mean 0
    and variance 1, then scaled by g and shifted by b, both [n_embd] and learned.

    Why: vectors grow as the blocks add to them. With normalization every layer gets inputs of the same
    size, at any depth, and training is stable. eps avoids a division by zero for a constant vector.
    """
    centred = x - x.sum(axis=-1, keepdims=True) / x.shape[-1]
    variance = (centred * centred).sum(axis=-1, keepdims=True) / x.shape[-1]  # [..., n_embd] -> [..., 1]
    return g * (centred / np.sqrt(variance + eps)) + b


@keeps_dtype
def linear(x, w, b):
    """A matrix product plus a bias: each output is a weighted sum of all inputs. w is [n_in, n_out], b is [n_out], as
    in the checkpoint."""
    return x @ w + b  # [..., n_in] -> [..., n_out]


# ---- The feed-forward network ----


def ffn(x, c_fc, c_proj):
    """The position-wise feed-forward network, also called MLP ([Transformer] section 3.3): two linear layers with a
    nonlinearity between them, applied to each row of x, [n_seq, n_embd], by itself.

    Why the nonlinearity: two linear layers in a row are only one linear layer with another matrix. Why four times as
    wide in between: each of the 4*n_embd hidden numbers can react to another pattern, so more of them react to more
    patterns; 4 is the ratio of [Transformer].
    """
    hidden = gelu(linear(x, **c_fc))  # [n_seq, n_embd] -> [n_seq, 4*n_embd]
    return linear(hidden, **c_proj)  # [n_seq, 4*n_embd] -> [n_seq, n_embd]


# ---- Attention: information moves between positions ----


@keeps_dtype
def attention_scores(q, k):
    """The similarity of each query and each key: their dot product, divided by sqrt(d_head) ([Transformer] section
    3.2.1)."""
    # A dot product of d_head random terms is about sqrt(d_head) in size. Undivided, such large scores saturate softmax:
    # one weight is nearly 1, the others nearly 0. A small change of a score then changes hardly any weight (the
    # gradient is nearly 0), so training cannot improve the scores.
    return q / math.sqrt(q.shape[-1]) @ k.mT  # [..., n_query, d_head] -> [..., n_query, n_key]


@keeps_dtype
def attention(q, k, v, mask):
    """Scaled dot-product attention: for each query, the mean of the values, weighted by how similar their keys are to
    that query ([Transformer] section 3.2.1).

    Queries, keys and values are learned projections of the same token vectors: a query stands for what a position looks
    for, a key for what a position offers to be found by, a value for the information it passes on when it is found.
    q is [..., n_query, d_head], k and v are [..., n_key, d_head]. mask is boolean, [n_query, n_key]: True where that
    query may attend to that key.
    """
    scores = attention_scores(q, k)  # [..., n_query, d_head] -> [..., n_query, n_key]
    # -1e10, as in OpenAI's code: so far below any score that softmax makes it exactly 0. With minus infinity, a row
    # that is masked completely would give NaN. dtype.type, as a Python float would turn bfloat16 into float32.
    weights = softmax(np.where(mask, scores, scores.dtype.type(-1e10)))
    return weights @ v  # [..., n_query, n_key] -> [..., n_query, d_head]


def split_heads(x, n_head):
    """Cuts each vector into n_head pieces of d_head numbers and makes the heads the first axis, so that one product
    computes all of them. Numbers 0 to d_head - 1 of each vector go to head 0, the next d_head to head 1, and so on. A
    reshape straight to [n_head, n_seq, d_head] would have the right shape, but would mix the tokens."""
    n_seq, n_embd = x.shape
    return x.reshape(n_seq, n_head, n_embd // n_head).swapaxes(0, 1)  # [n_seq, n_embd] -> [n_head, n_seq, d_head]


def merge_heads(x):
    """The inverse of split_heads: the pieces of all heads, side by side again."""
    n_head, n_seq, d_head = x.shape
    return x.swapaxes(0, 1).reshape(n_seq, n_head * d_head)  # [n_head, n_seq, d_head] -> [n_seq, n_embd]


def mha(x, c_attn, c_proj, n_head):
    """Multi-head causal self-attention ([Transformer] section 3.2.2) of x, [n_seq, n_embd].

    Why several heads: one softmax gives one set of weights, so one head can follow one relation between tokens, such as
    "the previous word" or "the subject of this verb". Several small heads follow several, at the cost of one large
    head. Each head writes into its own piece of the vector; c_proj then mixes the pieces of all heads into one result.
    """
    qkv = linear(x, **c_attn)  # [n_seq, n_embd] -> [n_seq, 3*n_embd]
    q, k, v = np.split(qkv, 3, axis=-1)  # [n_seq, 3*n_embd] -> 3 of [n_seq, n_embd]
    q, k, v = (split_heads(part, n_head) for part in (q, k, v))  # [n_seq, n_embd] -> [n_head, n_seq, d_head]
    # The causal mask: row i is True up to column i, so a position attends to itself and to earlier ones only. In
    # training, where the whole text is the input, a position could otherwise read the next token instead of predicting
    # it. In generation, it means that a new token changes nothing for the earlier ones.
    mask = np.tri(len(x), dtype=bool)  # -> [n_seq, n_seq]
    x = merge_heads(attention(q, k, v, mask))  # [n_head, n_seq, d_head] -> [n_seq, n_embd]
    return linear(x, **c_proj)


# ---- The model ----


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head):
    """One block: x, [n_seq, n_embd], plus what attention finds, plus what the feed-forward network computes.

    Why residual additions (x + ...): a block only has to learn a correction to x, and in training the gradient reaches
    the first block through the additions undiminished; without them deep stacks hardly learn (He et al. 2015). Why
    normalize before each part, and not after it as [Transformer] does: then x itself is never normalized, and x and its
    gradient pass from block to block through additions alone ([GPT-2] section 2.3, which adds one more layer norm after
    the last block).
    """
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head)
    return x + ffn(layer_norm(x, **ln_2), **mlp)


def embed(inputs, wte, wpe):
    """The vector of each token (its row of wte) plus the vector of its position (rows 0, 1, 2, ... of wpe), all
    learned.

    Why positions: attention compares vectors, and a row of wte does not say where its token stands. Without wpe, a
    block would compute the same for the last token of "Lily and Tom went" and of "Tom and Lily went".
    """
    return wte[np.asarray(inputs)] + wpe[: len(inputs)]  # [n_seq] -> [n_seq, n_embd]


@keeps_dtype
def unembed(x, wte):
    """The logits: the dot product of each vector with each token embedding.

    wte serves here again (weight tying, Press & Wolf 2017): tokens that are used alike need similar vectors at the
    input and similar logits at the output, so one table can serve both, and 38 million of 124M's parameters are stored
    once, not twice.
    """
    return x @ wte.T  # [..., n_embd] -> [..., n_vocab]


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head):
    """The logits of every position, [n_seq, n_vocab]: row i scores the candidates for position i + 1 ([GPT-2] section
    2.3).

    One call makes n_seq predictions because row i depends on tokens 0 to i alone, which the causal mask ensures.
    Training uses all rows, generation only the last. inputs are [n_seq] ids, wte is [n_vocab, n_embd], wpe [n_ctx,
    n_embd]; blocks and ln_f hold the arguments of the functions above. Ids are not checked here, as under jit they have
    no values yet: see check_inputs.
    """
    x = embed(inputs, wte, wpe)  # [n_seq] -> [n_seq, n_embd]
    for block in blocks:
        x = transformer_block(x, **block, n_head=n_head)
    return unembed(layer_norm(x, **ln_f), wte)  # [n_seq, n_embd] -> [n_seq, n_vocab]


# ---- Generation ----


def check_inputs(inputs, n_new, n_vocab, n_ctx):
    """Raises ValueError unless all ids are in the vocabulary and the prompt plus n_new tokens fit into n_ctx.

    Called once, before generation: NumPy reads id -1 as the last row of wte, JAX reads any id that is too large as the
    last row, and neither raises.
    """
    n_seq = len(inputs)
    if n_seq == 0 or n_new < 0:
        raise ValueError(f"{n_seq} input ids and {n_new} new tokens: at least 1 and at least 0 are needed")
    if n_seq + n_new > n_ctx:
        raise ValueError(
            f"prompt {n_seq} + {n_new} new = {n_seq + n_new} tokens > n_ctx {n_ctx}, all that this model can see: "
            f"shorten the prompt or generate at most {max(n_ctx - n_seq, 0)}"
        )
    if bad := [i for i in inputs if not 0 <= i < n_vocab]:
        raise ValueError(f"token id {bad[0]} is outside the vocabulary: ids go from 0 to {n_vocab - 1}")


def generate(inputs, params, n_head, n_tokens_to_generate):
    """The list of ids that continues the list `inputs`, each the most likely one (greedy decoding). `inputs` is not
    changed. Raises ValueError as check_inputs does.

    This is the loop to read, not the fast one: each new token sends all earlier ones through the model again.
    inference/kv_cache.py keeps the keys and values of the earlier tokens instead.
    """
    check_inputs(inputs, n_tokens_to_generate, n_vocab=len(params["wte"]), n_ctx=len(params["wpe"]))
    ids = list(inputs)
    for _ in range(n_tokens_to_generate):
        logits = gpt2(ids, **params, n_head=n_head)  # [n_seq] -> [n_seq, n_vocab]
        ids.append(int(np.argmax(logits[-1])))  # [n_vocab] -> one id
    return ids[len(inputs) :]


def main(prompt, n_tokens_to_generate=40, model_size="", models_dir=None):
    """Prints the continuation of a text: the whole way from text to text, for use from Python. The command line below
    runs inference/__main__.py, which adds a cache, sampling and flags."""
    import utils

    encoder, hparams, params = utils.load_model(model_size, models_dir)
    input_ids = encoder.encode(prompt)
    output_ids = generate(input_ids, params, hparams["n_head"], n_tokens_to_generate)
    print(encoder.decode(output_ids))


if __name__ == "__main__":  # python gpt2.py "prompt"
    from inference.__main__ import main as front_door

    cli.run(front_door, "gpt2.py")
