"""Models by name: find the folder, download what is missing, load the tokenizer, the hyperparameters and the params.

A thin facade over weights/, with the names of the article that this project follows. A model folder has OpenAI's layout
(TF_FILES: a TensorFlow checkpoint and its tokenizer) or Hugging Face's (config.json, model.safetensors and a
tokenizer). Both are loaded as the same `params`. A model may also be one file, NAME.gguf; where a function below takes
a folder, it takes such a file too.

    python utils.py verify 124M                              reads every tensor again and compares its checksum
    python utils.py convert models/3M out --layout hf        writes a model in the other layout
"""

if __name__ == "__main__":  # run as a program: Ctrl-C ends it from here on
    import sys

    sys.path.insert(0, __file__.removesuffix("utils.py"))
    import cli

    cli.leave_on_ctrl_c()

import contextlib
import functools
import json
import sys
from pathlib import Path
from typing import NamedTuple

from encoder import END_OF_TEXT, get_encoder
from weights import gguf, hub, huggingface, tensorflow
from weights.download import BASE_URL, DATA, INDEX, SHA256, TF_FILES, download_gpt2_files
from weights.files import read_json, read_text, replacing, write_text
from weights.huggingface import hf_tensors, load_gpt2_params_from_hf, load_llama_params_from_hf, write_tensors
from weights.params import architecture
from weights.tensorflow import load_gpt2_params_from_tf_ckpt, save_gpt2_params_to_tf_ckpt
from weights.tokenizer import tokenizer_json, tokenizer_texts

__all__ = ["BASE_URL", "DATA", "INDEX", "SHA256", "TF_FILES", "download_gpt2_files", "load_gpt2_params_from_tf_ckpt"]

MODELS_DIR = Path(__file__).resolve().parent / "models"
SIZES = ("124M", "355M", "774M", "1558M")  # published by OpenAI
HF_NAMES = dict(zip(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), SIZES, strict=True))  # the same four models
EMBEDDED = "3M"  # comes with this repository
LAYOUTS = ("tf", "hf")

# ---- A model by its name ----


def load_encoder_hparams_and_params(model_size, models_dir=None, base_url=None):
    """(Encoder, hparams, params) of a model.

    model_size is one of SIZES or a name for weights/hub.py, which are downloaded if they are not there, or the name of
    a folder in models_dir, or the path of a folder. hparams has n_vocab, n_ctx, n_embd, n_head, n_layer; that of a
    LLaMA is its config, which has more (variants/llama.py).
    Raises ValueError for a name that is none of these, OSError for what cannot be fetched, is missing or is damaged.
    """
    return load_folder(find_model(model_size, models_dir, base_url))


def load_model(model_size="", models_dir=None, base_url=None):
    """As above, but without a name it is the model that choose_model chooses. For programs."""
    return load_folder(choose_model(model_size, models_dir, base_url))


def load_folder(folder):
    """(Encoder, hparams, params) of a model folder whose files are there. Raises OSError as above."""
    encoder, hparams = get_encoder(folder.name, folder.parent), read_hparams(folder)
    if encoder.n_vocab > hparams["n_vocab"]:
        raise OSError(f"{folder}: the tokenizer has ids up to {encoder.n_vocab - 1}, n_vocab is {hparams['n_vocab']}")
    return encoder, hparams, load_params(folder, hparams)


def load_params(folder, hparams):
    """The params of a model folder, whichever its layout and its architecture."""
    if folder.suffix == ".gguf":
        return gguf.load_llama_params(folder, hparams)
    if architecture(hparams) == "llama":
        return load_llama_params_from_hf(folder / "model.safetensors", hparams)
    if is_hf_folder(folder):
        return load_gpt2_params_from_hf(folder / "model.safetensors", hparams)
    return load_gpt2_params_from_tf_ckpt(tensorflow.latest_checkpoint(folder / "checkpoint"), hparams)


def choose_model(model_size="", models_dir=None, base_url=None):
    """The folder of a model for a program. If no size is named, that is 124M; and if 124M is neither on disk nor
    reachable, it is 3M, the model that comes with this repository, and one line on stderr says so."""
    try:
        return find_model(model_size or SIZES[0], models_dir, base_url)
    except OSError as error:
        if model_size:
            raise
        print(f"{EMBEDDED} (embedded) answers instead of {SIZES[0]}: {error}", file=sys.stderr)
        return find_model(EMBEDDED)


def find_model(model_size, models_dir=None, base_url=None):
    """The folder of a model; what is missing is downloaded if it is one of SIZES, or a name for weights/hub.py. Raises
    as the loader above."""
    folder = model_folder(model_size, models_dir)
    if folder.name in SIZES and not is_path(model_size) and not is_hf_folder(folder):
        download_gpt2_files(folder.name, folder, base_url)
    return folder


def model_folder(model_size, models_dir=None):
    """The folder of a model, which need not exist for one of SIZES. Raises ValueError for any other that is neither
    there nor a name for weights/hub.py, which may raise OSError.

    A bare name is looked up in models_dir, then in the current folder, then in models/ of this repository. Anything
    with a slash, and "." and "..", is a path, as in a shell; only if nothing is there, owner/name is one of the Hugging
    Face hub's.
    """
    models_dir, name = Path(models_dir or MODELS_DIR), HF_NAMES.get(model_size, model_size)
    candidates = [Path(name)] if is_path(name) else [models_dir / name, Path(name), MODELS_DIR / name]
    with contextlib.suppress(OSError):  # a name that is too long for a folder
        folder = next((folder for folder in candidates if is_model(folder)), candidates[0])
        if name and (name in SIZES or is_model(folder)):
            return folder.resolve() if is_path(name) else folder
    if hub.is_name(model_size):
        return hub.fetch(model_size)
    import difflib  # here, as only mistakes need it

    names = [*SIZES, *sorted({EMBEDDED, *hub.REPOSITORIES, *(path.name for path in models_dir.glob("*/"))} - {*SIZES})]
    guess = "".join(f"did you mean {n}? " for n in difflib.get_close_matches(model_size.upper(), names, 1, 0.4))
    raise ValueError(f"no model {model_size!r:.80}; {guess}Choose from {', '.join(names)}, or name a model folder")


def is_model(path):
    """Whether there is something at a path that may be a model: a folder, or a .gguf file."""
    return path.is_dir() or (path.suffix == ".gguf" and path.exists())


def is_path(name):
    return name in (".", "..") or "/" in name or "\\" in name


def is_hf_folder(folder):
    return (folder / "config.json").exists() and not (folder / "hparams.json").exists()


def read_hparams(folder):
    """{n_vocab, n_ctx, n_embd, n_head, n_layer} of a model folder, each a whole number above 0; more for a LLaMA.
    Raises OSError."""
    if folder.suffix == ".gguf":
        return gguf.read_config(folder)
    if is_hf_folder(folder):
        return huggingface.read_hparams(folder / "config.json")
    return tensorflow.read_hparams(folder / "hparams.json")


def has_tokenizer(folder):
    """Whether a model folder has a file of a tokenizer. (A folder of weights alone is of use from Python only.)"""
    names = ("tokenizer.json", "vocab.json", "encoder.json")
    return not folder.is_dir() or any((folder / name).exists() for name in names)


# ---- How a text starts and ends ----


class Ending(NamedTuple):
    """How a model ends a text: the ids that end one, and whether generation stops there unless told otherwise."""

    end_ids: tuple
    stop_at_eos: bool


def read_ending(folder, encoder, hparams):
    """The Ending of a model folder: `end_ids` and `stop_at_eos` of hparams.json, or `eos_token_id` of Hugging Face's
    generation_config.json, or of config.json where that is missing, or what weights.gguf.end_ids finds. Raises OSError
    for values that are no token ids.

    Where nothing is said, <|endoftext|> ends a text. OpenAI's models, known by their 50,257 tokens, do not stop at it
    (they go on with another document), nor do those of a generation_config.json without an eos_token_id; others do.
    """
    file, limit = folder, hparams["n_vocab"]
    if folder.suffix == ".gguf":
        end_ids, stop_at_eos = gguf.end_ids(folder, encoder.special), True
    elif is_hf_folder(folder):
        file = next(folder / name for name in ("generation_config.json", "config.json") if (folder / name).exists())
        end_ids, limit = read_json(file).get("eos_token_id"), 2**24  # transformers writes 50256 even for fewer tokens
        stop_at_eos = end_ids is not None and (file.name != "config.json" or hparams["n_vocab"] != 50257)
    else:
        file = folder / "hparams.json"
        found = read_json(file)
        end_ids, stop_at_eos = found.get("end_ids"), found.get("stop_at_eos", limit != 50257)
    if end_ids is None:
        end_ids = [] if encoder.end_of_text is None else [encoder.end_of_text]
    end_ids = end_ids if isinstance(end_ids, list) else [end_ids]
    if odd := [i for i in end_ids if type(i) is not int or not 0 <= i < limit]:
        raise OSError(f"{file}: the end id {odd[0]!r:.40} is not one of the {hparams['n_vocab']} token ids")
    return Ending(tuple(i for i in end_ids if i < hparams["n_vocab"]), bool(stop_at_eos))


@functools.lru_cache
def ids_without_token(encoder, n_vocab, end_ids=()):
    """The ids below n_vocab that must not be chosen: those for which the tokenizer has no token, but end_ids. A model
    may have more rows in wte than its tokenizer has tokens: padding to a round number, or gaps in the ids."""
    if len(encoder.spellings) == n_vocab:
        return ()
    return tuple(sorted(set(range(n_vocab)) - encoder.spellings.keys() - set(end_ids)))


def first_ids(encoder, prompt):
    """The ids of the prompt, after those that the model expects before every text. For an empty prompt: the id of
    <|endoftext|>, after which a model begins a new text. Raises ValueError if the tokenizer has no such token."""
    ids = [*encoder.prefix, *encoder.encode(prompt)]
    if not ids and encoder.end_of_text is None:
        raise ValueError(f"this model knows no {END_OF_TEXT} to start from: give a prompt")
    return ids or [encoder.end_of_text]


# ---- Saving ----


def layouts_of(hparams):
    """The layouts in which a model can be written: OpenAI's has no place for what a LLaMA has more than a GPT-2."""
    return LAYOUTS if architecture(hparams) == "gpt2" else ("hf",)


def save_tokenizer(source, folder, layouts=LAYOUTS):
    """Writes the tokenizer of the folder `source` as the two files of each layout: unchanged if the source has them,
    else made from its tokenizer.json. One that is not GPT-2's is written as a tokenizer.json. Raises OSError if a file
    is missing or damaged, ValueError for OpenAI's layout of a tokenizer that is not GPT-2's."""
    source, names = Path(source), {"hf": ("vocab.json", "merges.txt"), "tf": ("encoder.json", "vocab.bpe")}
    encoder = get_encoder(source.name, source.parent)
    if encoder.splitting != "gpt-2":
        return save_other_tokenizer(source, encoder, Path(folder), layouts)
    data = [text.encode() for text in tokenizer_texts(encoder.ids, encoder.ranks)]
    for vocabulary, merges in names.values():
        if (source / vocabulary).exists() and read_json(source / vocabulary) == encoder.ids:
            data = [(source / vocabulary).read_bytes(), (source / merges).read_bytes()]
            break
    for layout in layouts:
        for name, content in zip(names[layout], data, strict=True):
            with replacing(Path(folder, name)) as part:
                part.write_bytes(content)
    get_encoder(Path(folder).name, Path(folder).parent)  # what was written can be read


def save_other_tokenizer(source, encoder, folder, layouts):
    """save_tokenizer for one that is not GPT-2's: as the source's tokenizer.json, or as one made from a GGUF file."""
    if "tf" in layouts:
        raise ValueError(f"{source}: its tokenizer is not GPT-2's, so OpenAI's layout has no place for it")
    if not (source / "tokenizer.json").exists():
        write_text(folder / "tokenizer.json", tokenizer_json(encoder.ids, encoder.ranks, encoder.special))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists():
            write_text(folder / name, read_text(source / name))


def save_model(folder, hparams, params, layouts=LAYOUTS, name="model.ckpt", ending=None):
    """Writes hparams, params and the Ending; a folder may have both layouts. `name` is the TensorFlow checkpoint's.
    Of `layouts` those of layouts_of(hparams) are written.

    The weights are written last, so the folder can be loaded at any moment.
    """
    folder, layouts = Path(folder), {*layouts} & {*layouts_of(hparams)}
    if "hf" in layouts:
        vocab = folder / "vocab.json"
        end_of_text = read_json(vocab).get(END_OF_TEXT) if vocab.exists() else None
        write_text(folder / "config.json", json.dumps(huggingface.hf_config(hparams, end_of_text), indent=1) + "\n")
        if ending:
            eos = {"eos_token_id": list(ending.end_ids)} if ending.stop_at_eos else {}
            write_text(folder / "generation_config.json", json.dumps({"bos_token_id": end_of_text} | eos) + "\n")
        write_tensors(folder / "model.safetensors", hf_tensors(hparams, params))
    if "tf" in layouts:
        write_text(folder / "hparams.json", json.dumps(hparams | (ending._asdict() if ending else {})))
        save_gpt2_params_to_tf_ckpt(folder / name, params)


if __name__ == "__main__":
    from tools import models

    cli.run({"verify": models.verify, "convert": models.convert}, "utils.py")
