"""The config of timm students, which tells the names of the classes as that of any other model does."""

from typing import Any

from transformers import TimmWrapperConfig


class LabelledTimmConfig(TimmWrapperConfig):
    """A `TimmWrapperConfig` that saves `id2label` and `label2id` beside its own `label_names`.

    Programs that read the file without timm (optimum, transformers.js) know these two alone.
    """

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "id2label": self.id2label, "label2id": self.label2id}


# The Auto classes of transformers look a config's class up by this name; pickle goes by another one.
LabelledTimmConfig.__name__ = TimmWrapperConfig.__name__
