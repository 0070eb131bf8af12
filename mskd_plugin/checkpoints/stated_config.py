"""The config that a checkpoint of OpenMMLab's states, read as text, not run."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any


def stated_config(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the config that a checkpoint states, as plain values.

    MMEngine keeps a config's text under ``meta.cfg``; before MMEngine it was ``meta.config``. What
    is no literal, ``dict(...)`` or list is returned as its text.

    Args:
        checkpoint: What the file holds.

    Returns:
        The settings by name; empty where the checkpoint states none.

    Example:
        >>> stated_config({"meta": {"cfg": "a = dict(b=(1, -2.0), c={'d': len})"}})
        {'a': {'b': [1, -2.0], 'c': {'d': 'len'}}}
        >>> stated_config({})
        {}
    """
    meta = checkpoint.get("meta")
    texts = [meta.get(key) for key in ("cfg", "config")] if isinstance(meta, Mapping) else []
    text = next(filter(None, texts), None)
    if not isinstance(text, str):
        return {}
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError):
        return {}
    return {
        target.id: _plain(node.value)
        for node in statements
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _plain(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {keyword.arg: _plain(keyword.value) for keyword in node.keywords if keyword.arg}
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values)
        return {key.value: _plain(value) for key, value in pairs if isinstance(key, ast.Constant)}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_plain(element) for element in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
