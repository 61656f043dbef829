"""Uploading students: `model.push_to_hub` with card, report and image processor, and errors that say what to do."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, HTTPError
from transformers import PreTrainedModel

from .._text import quote, reason
from ..errors import InputError, UploadError
from ..reporting.html_report import html_report
from .model_card import model_card
from .model_preprocessing import processor_of


REPORT = "report.html"


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | str | None = None,
    **card: Any,
) -> CommitInfo:
    """Upload a student: packed weights, config, image processor, model card and report. It is `model.push_to_hub`.

    Args:
        model (`PreTrainedModel`): The student.
        repo_id (`str`): Repository, created where it does not exist.
        commit_message, commit_description, private, token, revision, create_pr, max_shard_size, tags (*optional*):
            As in [`~transformers.PreTrainedModel.push_to_hub`].
        **card: What [`~sqakd_hf.hub.model_card.model_card`] takes, but for names of files. A card that the repository
            has is kept; the report is written anew, of the weights.

    Raises:
        `InputError`: `card` names files, which are not uploaded.
        `UploadError`: The Hub refused, or the connection broke.
    """
    if files := card.keys() & {"learning_curve", "report"}:
        raise InputError(f"push_to_hub writes its own report: leave out {quote(sorted(files))}.")
    api = HfApi(token=token)
    tags = [tags] if isinstance(tags, str) else [*(tags or ()), *(model.model_tags or ())]
    with tempfile.TemporaryDirectory() as folder:
        # First all that can fail on this side.
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if (processor := processor_of(model)) is not None:
            processor.save_pretrained(folder)
        with open(os.path.join(folder, REPORT), "w", encoding="utf-8") as file:
            file.write(html_report(model, repo_id))
        local = "Nothing was changed on this side"
        with upload_errors(repo_id, local):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            try:
                written = ModelCard.load(repo_id, token=token)
            except EntryNotFoundError:
                written = None
        if written is None:
            written = model_card(
                model,
                repo_id,
                tags=tags,
                stored_bytes=weight_bytes(folder),
                report=REPORT,
                **{"base_model": model.hf_quantizer.base_model, **card},
            )
        else:
            written.data.tags = list(dict.fromkeys([*(written.data.tags or ()), *tags])) or None
        written.save(os.path.join(folder, "README.md"))
        with upload_errors(repo_id, local):
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload model",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


def weight_bytes(folder: str) -> int:
    """Return the size of the safetensors files in `folder`."""
    return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.name.endswith(".safetensors"))


@contextlib.contextmanager
def upload_errors(repo_id: str | None, local: str) -> Iterator[None]:
    """Turn the errors of the Hub's client into an `UploadError`; `local` says what became of the local files."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: the Hub's transfer library
        raise UploadError(
            f"The upload to {repo_id!r} did not complete: {reason(error)}. {local}: call push_to_hub again, after "
            "checking the connection, the repository's name and the token (`hf auth login`)."
        ) from error
