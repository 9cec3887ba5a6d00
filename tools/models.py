"""Commands on model folders: check one against its checksums, or write it in the other layout.

python utils.py verify models/3M
python utils.py convert models/3M models/3M-hf --layout hf       # OpenAI's layout to Hugging Face's
python utils.py convert models/3M-hf models/3M-tf --layout tf    # and back, with the same numbers
"""

import sys
from pathlib import Path

import cli
import utils
from inference import chat
from weights.download import SHA256, digest
from weights.files import locked, new_folder
from weights.params import architecture, not_finite
from weights.tensorflow import file_damages, latest_checkpoint


def verify(model_size: str = utils.SIZES[0], models_dir: str = ""):
    """Reads a model from disk and prints a line for each damaged tensor or file. Exit status 1 if there is one.

    Args:
        model_size: 124M, 355M, 774M, 1558M, or a model folder
        models_dir: where the folders of models are; left out, models/ beside utils.py
    """
    folder = utils.model_folder(model_size, models_dir)
    found = list(problems(folder, SHA256 if model_size in utils.SIZES else {}))
    print("\n".join(found) if found else f"{folder}: whole and sound")
    sys.exit(1 if found else 0)


def problems(folder, sha256):
    """Yields a line for each damaged tensor and file of a model folder. (safetensors has no checksums: there only
    names, shapes, places and the numbers themselves are checked.)"""
    try:
        for name, expected in sha256.items():
            if (folder / name).exists() and digest(folder / name, "sha256").hex() != expected:
                yield f"{folder / name}: not OpenAI's file, its SHA-256 should be {expected}"
        if folder.is_dir() and not utils.is_hf_folder(folder):
            prefix = latest_checkpoint(folder / "checkpoint")
            lines = list(file_damages(f"{prefix}.index", f"{prefix}.data-00000-of-00001"))
            yield from lines
            if lines:
                return
        encoder, hparams, params = utils.load_folder(folder)
        utils.read_ending(folder, encoder, hparams)
        if names := not_finite(params):
            yield f"{folder}: NaN or infinity in {names}"
    except OSError as error:
        yield cli.one_line(error)


def convert(model: str = "", out: str = "", *, layout: str = "", models_dir: str = ""):
    """Writes a model in OpenAI's layout or Hugging Face's, each number as it is.

    Args:
        model: 124M, 355M, 774M, 1558M, 3M or a model folder
        out: the folder to make
        layout: tf (OpenAI's, a TensorFlow checkpoint) or hf (Hugging Face's, safetensors)
        models_dir: where the folders of models are; left out: models/ beside utils.py
    """
    if layout not in utils.LAYOUTS:
        raise ValueError(f"--layout {layout!r}: choose {' or '.join(utils.LAYOUTS)}")
    if not out or Path(out).exists():
        raise ValueError(f"{out} is there already: name a folder to make" if out else "name a folder to make")
    source = utils.find_model(model, models_dir)
    encoder, hparams, params = utils.load_folder(source)
    if layout not in utils.layouts_of(hparams):
        raise ValueError(f"{source} is a {architecture(hparams)}: OpenAI's layout holds a gpt2 alone")
    if layout == "tf" and params["wte"].dtype.itemsize > 4:
        raise ValueError(f"{source} has numbers of {params['wte'].dtype}: OpenAI's layout holds float32 alone")
    with locked(out), new_folder(Path(out)) as part:
        utils.save_tokenizer(source, part, [layout])
        chat.save_template(source, part)
        ending = utils.read_ending(source, encoder, hparams)
        utils.save_model(part, hparams, params, [layout], ending=ending)
    print(f"{out}: {model} in the layout {layout}")
