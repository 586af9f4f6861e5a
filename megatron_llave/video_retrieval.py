"""Zero-shot text-video retrieval: Recall@1, 5, 10 and the median rank, from texts to videos and back.

Used by tools/evaluate.py video. Prompts and frames are the released code's (golden notes; data/video.py). A caption's
right answer is its video; a video's is any of its captions.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llave.data.file_inputs import FileInput, FileInputs
from megatron_llave.data.sources.video_sets import CaptionedVideo
from megatron_llave.embedding_store import EmbeddingStore, Identity
from megatron_llave.errors import DataError
from megatron_llave.figures import replacing
from megatron_llave.retrieval import similarities
from megatron_llave.stored_embedding import EmbedParts, Progress, embed_missing

TEXT_PROMPT = "Find me an video that matches the given caption: {}"
VIDEO_PROMPT = "<image>\nRepresent the given video."
DEPTHS = (1, 5, 10)
SCORES_FILE = "scores.json"


def evaluate_videos(
    embed_parts: EmbedParts,
    videos: Sequence[CaptionedVideo],
    folder: str | Path,
    out: str | Path,
    identity: Identity,
    replicas: dist.ProcessGroup,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, dict[str, float]]:
    """Embed what is not there yet and score; the first rank writes scores.json into `out`.

    Args:
        embed_parts: of this rank's replica.
        videos: with their captions.
        folder: that the videos' files lie in.
        out: folder for embeddings and scores, shared by all ranks.
        identity: of the model; only the first rank's counts.
        replicas: data-parallel ranks that the embedding is dealt to.
        progress: told of each part.

    Raises:
        DataError: see embed_missing, or the scores cannot be written.

    Returns:
        text_to_video and video_to_text: recall@k in percent, median_rank; the same on all ranks.
    """
    out = Path(out)
    captions = [(caption, number) for number, video in enumerate(videos) for caption in video.captions]
    texts = FileInputs("captions", [FileInput(TEXT_PROMPT.format(caption)) for caption, _ in captions], folder)
    inputs = [FileInput(VIDEO_PROMPT, video=video.file, id=video.id) for video in videos]
    clips = FileInputs("videos", inputs, folder, hint="--videos names the folder that they are looked for in")
    stores = [EmbeddingStore(out / "embeddings" / inputs.name, inputs) for inputs in (texts, clips)]
    embed_missing(embed_parts, stores, identity, replicas, progress)
    text, video = (torch.from_numpy(store.rows(np.arange(store.bounds[-1]))) for store in stores)
    belongs = torch.tensor([number for _, number in captions])[:, None] == torch.arange(len(videos))  # [texts, videos]
    both = {"text_to_video": (text, video, belongs), "video_to_text": (video, text, belongs.T)}
    scores = {name: summarise_ranks(ranks_of_right(*sides)) for name, sides in both.items()}
    if dist.get_rank() == 0:
        try:
            with replacing(out / SCORES_FILE) as partial:
                partial.write_text(json.dumps(scores, indent=2) + "\n")
        except OSError as error:
            raise DataError(f"{out / SCORES_FILE} cannot be written: {error.strerror}") from error
    dist.barrier()
    return scores


def ranks_of_right(queries: Tensor, candidates: Tensor, is_right: Tensor, chunk: int = 1024) -> Tensor:
    """Rank, from 1, of each query's best right candidate, [q] int64; equal candidates stand in index order.

    Args:
        queries: [q, d] of unit length.
        candidates: [c, d] of unit length.
        is_right: [q, c] bool, with a right one in each row.
        chunk: queries whose similarities are held at a time.
    """
    ranks = []
    for start in range(0, len(queries), chunk):
        similarity, right = similarities(queries[start : start + chunk], candidates), is_right[start : start + chunk]
        best = similarity.masked_fill(~right, -torch.inf).max(dim=1, keepdim=True)  # the first of equal ones
        index = torch.arange(len(candidates))
        is_before = (similarity > best.values) | ((similarity == best.values) & (index < best.indices))
        ranks.append(1 + is_before.sum(dim=1))
    return torch.cat(ranks)


def summarise_ranks(ranks: Tensor) -> dict[str, float]:
    """Recall@k in percent for each of DEPTHS, and the median rank."""
    found = {f"recall@{k}": 100.0 * int((ranks <= k).sum()) / len(ranks) for k in DEPTHS}
    return {**found, "median_rank": float(np.median(ranks.numpy()))}
