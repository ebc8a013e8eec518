"""Finds the experiments by walking the topics' folders: a new file there is a new experiment."""

import importlib
import pkgutil

import experiments
from experiments._framework.experiment import Experiment


def by_topic() -> dict[str, dict[str, Experiment]]:
    """The experiments by topic: every module in the topic's folder that has an ``EXPERIMENT``."""
    found: dict[str, dict[str, Experiment]] = {}
    for module in pkgutil.walk_packages(experiments.__path__, "experiments."):
        topic = module.name.split(".")[1]
        if topic.startswith("_"):
            continue
        if one := getattr(importlib.import_module(module.name), "EXPERIMENT", None):
            found.setdefault(topic, {})[one.name] = one
    return found
