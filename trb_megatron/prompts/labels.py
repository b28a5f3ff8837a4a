"""Class labels: columns of numbers that stand for names, which the `datasets` library declares."""

import json
from collections.abc import Mapping
from typing import Any


def declared_features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The features by column that `datasets` writes into the metadata of an Arrow schema.

    Empty where there is no class label among them.
    """
    content = (metadata or {}).get(b"huggingface", b"")
    if b"ClassLabel" not in content:
        return {}
    features: dict[str, Any] = json.loads(content)["info"]["features"]
    return features


def with_names(value: Any, feature: Any) -> Any:
    """A value with the names of its class labels in place of their numbers, at any depth.

    -1 is no label, so that it becomes None. Raises ValueError for a number without a name.
    """
    if value is None or feature is None:
        return value
    if isinstance(feature, list):
        return [with_names(element, feature[0]) for element in value]
    kind = feature.get("_type")
    if kind == "ClassLabel" and isinstance(value, int):
        names = feature["names"]
        if not -1 <= value < len(names):
            raise ValueError(f"{value} is no class label; the labels are 0 to {len(names) - 1}")
        return None if value == -1 else names[value]
    if kind in ("List", "LargeList", "Sequence"):
        inner = feature["feature"]
        if isinstance(value, dict):  # a sequence of objects is stored as an object of lists
            return {key: with_names(part, [inner.get(key)]) for key, part in value.items()}
        return [with_names(element, inner) for element in value]
    if not isinstance(kind, str) and isinstance(value, dict):
        return {key: with_names(part, feature.get(key)) for key, part in value.items()}
    return value
