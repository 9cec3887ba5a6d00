"""GPT-2 and nothing else. gpt2.py is the same, explained: the same operations in the same order, bit for bit."""

if __name__ == "__main__":  # as a program: Ctrl-C ends it from here on
    import sys; sys.path.insert(0, __file__.removesuffix("gpt2_pico.py"))
    import cli; cli.leave_on_ctrl_c()

import math

import numpy as np


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))

def softmax(x):
    exp_x = np.exp(x - x.max(axis=-1, keepdims=True))
    return exp_x / exp_x.sum(axis=-1, keepdims=True)

def layer_norm(x, g, b, eps=1e-5):
    centred = x - x.sum(axis=-1, keepdims=True) / x.shape[-1]
    variance = (centred * centred).sum(axis=-1, keepdims=True) / x.shape[-1]
    return g * (centred / np.sqrt(variance + eps)) + b

def linear(x, w, b):
    return x @ w + b

def ffn(x, c_fc, c_proj):
    return linear(gelu(linear(x, **c_fc)), **c_proj)

def attention(q, k, v, mask):
    return softmax(np.where(mask, q / math.sqrt(q.shape[-1]) @ k.mT, -1e10)) @ v

def mha(x, c_attn, c_proj, n_head):
    n_seq, n_embd = x.shape
    q, k, v = (part.reshape(n_seq, n_head, -1).swapaxes(0, 1) for part in np.split(linear(x, **c_attn), 3, axis=-1))
    x = attention(q, k, v, np.tri(n_seq, dtype=bool))
    return linear(x.swapaxes(0, 1).reshape(n_seq, n_embd), **c_proj)

def transformer_block(x, mlp, attn, ln_1, ln_2, n_head):
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head)
    return x + ffn(layer_norm(x, **ln_2), **mlp)

def gpt2(inputs, wte, wpe, blocks, ln_f, n_head):
    x = wte[np.asarray(inputs)] + wpe[: len(inputs)]
    for block in blocks:
        x = transformer_block(x, **block, n_head=n_head)
    return layer_norm(x, **ln_f) @ wte.T

def generate(inputs, params, n_head, n_tokens_to_generate):
    ids = list(inputs)
    for _ in range(n_tokens_to_generate):
        ids.append(int(np.argmax(gpt2(ids, **params, n_head=n_head)[-1])))
    return ids[len(inputs) :]

def main(prompt: str = "", *, n_tokens_to_generate: int = 40, model_size: str = "", models_dir: str = ""):
    from utils import choose_model, first_ids, load_folder, read_ending

    encoder, hparams, params = load_folder(folder := choose_model(model_size, models_dir))
    inputs = first_ids(encoder, prompt)
    if (n_seq := len(inputs)) + n_tokens_to_generate > hparams["n_ctx"]:
        raise ValueError(f"prompt {n_seq} + {n_tokens_to_generate} new tokens > n_ctx {hparams['n_ctx']}")
    params["wte"] = params["wte"][: encoder.n_vocab]  # further rows, if there are any, are of no token
    ids = generate(inputs, params, hparams["n_head"], n_tokens_to_generate)
    end_ids, stops = read_ending(folder, encoder, hparams)
    print(encoder.decode(ids[: next((n for n, i in enumerate(ids) if stops and i in end_ids), None)]))

if __name__ == "__main__":
    cli.run(main, "gpt2_pico.py")
