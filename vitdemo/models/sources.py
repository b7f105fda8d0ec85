"""Finds the model for a name: the bundled one, one of timm's, a folder, or a repository of the Hugging Face hub."""

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import timm

from vitdemo.errors import VitdemoError
from vitdemo.models import huggingface, timm_models
from vitdemo.models.checkpoints import SUFFIXES, Checkpoint
from vitdemo.models.loading import Plan, hub_file, is_name, read_config
from vitdemo.paths import MODELS, data_path

HUB = re.compile(r"^(hf-hub|hf_hub|hf):")
ADAPTER = "adapter_config.json"


def is_file(name: str) -> bool:
    """Whether a name is the path of a file. One of timm's names is never taken for a path."""
    return os.path.isfile(name) and not is_name(name)


def architecture_of(checkpoint: Checkpoint) -> str:
    """timm's name of the architecture that a checkpoint states. Raises VitdemoError where it states none."""
    name = str(checkpoint.said.get("model")).removeprefix("timm/")
    if not is_name(name):
        cure = "give that as the model and this file with --weights, or the folder that holds it with its config.json"
        raise VitdemoError(f"{checkpoint.path}: does not say its architecture; {cure}")
    return name


def planned(name: str, *, pretrained: bool, said: Mapping) -> tuple[str, Plan]:
    """The full tag of the model that ``name`` means, and its plan.

    Args:
        name: as in ``load_model``.
        pretrained: whether the weights that belong to the name will be loaded.
        said: ``Checkpoint.said`` of the checkpoint that will be loaded.

    Raises:
        VitdemoError: for a model that does not exist or is not an image classifier.
    """
    if name in MODELS:
        return name, _plan_from_files(partial(_in_folder, data_path(MODELS[name])), pretrained)
    folder = name.removeprefix("local-dir:")
    if folder != name or (os.path.exists(folder) and not is_name(folder)):
        folder = Path(folder).resolve()
        return folder.name, _plan_from_files(partial(_in_folder, folder), pretrained)
    bare = HUB.sub("", name)
    if (tag := bare.removeprefix("timm/")) != bare and tag in timm.list_pretrained():
        bare = name = tag
    if bare != name:
        return name, _plan_from_files(partial(_in_hub, bare), pretrained)
    name = timm.models.get_deprecated_models().get(name) or name  # older names, as in older checkpoints
    return name, timm_models.plan_from_name(name, pretrained=pretrained, others=MODELS, said=said)


def _plan_from_files(find: Callable[..., Path], pretrained: bool) -> Plan:
    """The plan of a config.json in either layout; ``find`` returns the path of the first of several files."""
    path = find("config.json")
    config = read_config(path, "" if path.exists() else _instead(path.parent))
    if huggingface.is_config(config):
        return huggingface.plan_from_config(path, config, find)
    return timm_models.plan_from_config(path, config, find, pretrained=pretrained)


def _instead(folder: Path) -> str:
    """The advice for a folder without config.json, or "" where nothing in the folder helps."""
    if not folder.is_dir():
        return "there is no such folder; check the path"
    if (folder / ADAPTER).exists():
        base = read_config(folder / ADAPTER).get("base_model_name_or_path")
        merge = f"PeftModel.from_pretrained(BASE, {str(folder)!r}).merge_and_unload().save_pretrained(NEW_FOLDER)"
        return f"this is a LoRA adapter without its base {base!r}; `{merge}` makes a model of both"
    if weights := sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES):
        return f"give the architecture as the model and {weights[0]} with --weights"
    if inner := sorted(folder.glob("*/config.json"), key=os.path.getmtime):
        return f"give the folder {inner[-1].parent}, which holds one"
    return "" if any(folder.iterdir()) else "the folder is empty; give the one that the model was saved to"


def _in_folder(folder: Path, *names: str) -> Path:
    """The first of ``names`` that exists, or else the first name, whose reader then reports that it is missing."""
    return next((folder / name for name in names if (folder / name).exists()), folder / names[0])


def _in_hub(repo_id: str, *names: str) -> Path:
    files = " ".join(f"--include '{name}'" for name in ("*.json", *huggingface.WEIGHTS_FILES))
    folder = repo_id.rpartition("/")[2]
    bring = f"run `hf download {repo_id} {files} --local-dir {folder}`, bring that folder here and give it as the model"
    return hub_file(repo_id, *names, bring=bring)
