"""A new tower learns words before any decoder reads them: what it makes of an image becomes the embeddings of the words of its caption.

A random tower in front of a pretrained decoder learns slowly through it. The decoder's table of embeddings is enough to begin with: the
i-th token of an image is to lie at the i-th word of its caption. No decoder runs, so a step costs the tower alone. (Ours; the paper begins
with pretrained models.) Letters: B images of n tokens, W words, C size of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from laid_ds.disk import whole_folder
from laid_ds.models.attention import decoder
from laid_ds.models.chat import turn_text
from laid_ds.models.folder import copy_beside
from laid_ds.models.from_decoder import num_bytes
from laid_ds.models.load import load_model
from laid_ds.models.processor import PixelsLike, Renderer, SampleLike, load_processor
from laid_ds.terminal import track

BATCH, RATE, BETAS, WARMUP, CLIP = 64, 1e-3, (0.9, 0.98), 30, 1.0
SHARPNESS = 10.0
"""Of the choice among words by squared distance, where two words are at a mean squared distance of 1."""
HELD_OUT = 10
"""Every tenth caption is not learned; there are at least as many."""


def write_with_words(
    stock: str | Path, output: str | Path, captions: Sequence[SampleLike], pixels: PixelsLike, steps: int, seed: int
) -> tuple[int, float]:
    """Write the model at `stock` with a tower that learned the words of captions; returns its number of parameters, and which share of
    the words of captions held out it then says.

    captions: samples of one image and one answer of as many words as an image has tokens. Decoder, embeddings and head stay as they are.
    Raises ValueError for captions of another length or too few of them, for images that differ in their number of tokens, and for a
    folder that exists.
    """
    stock, output = Path(stock), Path(output)
    if output.exists():
        raise ValueError(f"{output} exists; choose another folder or remove it")
    if len(captions) < HELD_OUT:
        raise ValueError(f"{len(captions)} captions are too few to learn from; give at least {HELD_OUT}")
    processor, model = load_processor(stock), load_model(stock)
    renderer = Renderer(processor, pixels, cache_bytes=0)
    seen = [_seen(renderer, sample) for sample in track(captions, "reading captions")]
    said = [_caption(sample, tokens) for sample, (_, tokens) in zip(captions, seen, strict=True)]
    if len({len(words) for words in said}) > 1:
        raise ValueError("some images take more tokens than others; give captions of images of one size")
    words = sorted({word for caption in said for word in caption})
    targets, places = word_embeddings(model, processor.tokenizer, words), {word: place for place, word in enumerate(words)}
    pairs = [(inputs, torch.tensor([places[word] for word in caption])) for (inputs, _), caption in zip(seen, said, strict=True)]
    learn(model, [pair for i, pair in enumerate(pairs) if i % HELD_OUT], targets, steps, seed)
    right = share_right(model, pairs[::HELD_OUT], targets)
    with whole_folder(output, f"the model {output.name}", num_bytes(model)) as partial:
        model.save_pretrained(partial)
        copy_beside(stock, partial)
    return model.num_parameters(), right


def _seen(renderer: Renderer, sample: SampleLike) -> tuple[dict[str, Tensor], int]:
    """What the model gets of a sample's image, and how many tokens it takes. Raises ValueError for a sample of other than one image."""
    if len(sample.images) != 1:
        raise ValueError(f"{sample.key} shows {len(sample.images)} images; a caption is a sample of one image")
    rendered = renderer(sample)
    return rendered.images[0], int((rendered.shows == 0).sum())


def _caption(sample: SampleLike, tokens: int) -> list[str]:
    """The words of the only answer. Raises ValueError unless they are as many as the tokens of the image."""
    answers = [turn for turn in sample.turns if turn.role == "assistant"]
    words = " ".join(map(turn_text, answers)).split()
    if len(answers) != 1 or len(words) != tokens:
        raise ValueError(
            f"{sample.key} has {len(answers)} answers of {len(words)} words in all ({' '.join(words)[:60]!r}), and its image takes {tokens}"
            f" tokens: give captions of one answer of {tokens} words"
        )
    return words


@torch.no_grad()
def word_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> Tensor:
    """[W, C]: each word as the decoder would read it inside a text, the mean where it is several tokens. Raises ValueError for fewer than
    two words, for one that the tokenizer has no token for or reads as a mark, and for two that it reads alike."""
    if len(words) < 2:
        raise ValueError(f"all captions say {words}; there is nothing to tell apart")
    table, read = model.get_input_embeddings().weight, [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    marks = set(tokenizer.all_special_ids)
    alike: dict[tuple[int, ...], list[str]] = {}
    for word, ids in zip(words, read, strict=True):
        if marks & {*ids}:
            raise ValueError(f"the tokenizer reads the word {word!r} of the captions as a mark of the model, or does not know it")
        alike.setdefault(tuple(sorted(ids)), []).append(word)
    if () in alike:
        raise ValueError(f"the tokenizer has no token for the word {alike[()][0]!r} of the captions")
    for one, *others in alike.values():
        if others:
            raise ValueError(
                f"the tokenizer reads the words {one!r} and {others[0]!r} of the captions alike, and none could be told from the other"
            )
    return torch.stack([table[ids].mean(0) for ids in read])


def encode(model: PreTrainedModel, images: Sequence[dict[str, Tensor]]) -> Tensor:
    """[B, n, C]: what the tower and what follows it hand to the decoder, of images as the processor makes them.

    Raises ValueError for a family that has no such thing, or in which it is not all that the decoder gets."""
    inputs = {name: torch.cat([image[name] for image in images]) for name in images[0]}
    inside = getattr(model, "model", model)
    found = inside.get_image_features(**inputs) if hasattr(inside, "get_image_features") else None
    if found is None or getattr(found, "deepstack_features", None):
        raise ValueError(
            f"{type(model).__name__} hands its decoder more than tokens of images, or not by themselves; --captions is for families that do"
        )
    return torch.stack([image.flatten(0, -2) for image in found.pooler_output])


def learn(model: PreTrainedModel, pairs: Sequence[tuple[dict[str, Tensor], Tensor]], targets: Tensor, steps: int, seed: int) -> None:
    """Train all but decoder and head on pairs of an image and the numbers [n] of its words.

    Of each token: its squared distance to its word, and the cross-entropy of the choice among all words [W, C] by squared distance, both
    in units of the mean squared distance between two words."""
    of_decoder = {id(p) for part in (decoder(model), model.get_output_embeddings()) for p in part.parameters()}
    trained = [p for p in model.parameters() if id(p) not in of_decoder]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=BETAS)
    schedule: LambdaLR = get_cosine_schedule_with_warmup(optimizer, min(WARMUP, steps), steps)
    drawn = torch.Generator().manual_seed(seed)
    for _ in track(range(steps), "the tower learns words", steps):
        chosen = [pairs[i] for i in torch.randint(len(pairs), (BATCH,), generator=drawn)]
        distances, said = _distances(model, [image for image, _ in chosen], targets), torch.stack([words for _, words in chosen])
        near = distances.gather(-1, said[..., None]).mean()
        loss = near + F.cross_entropy(-SHARPNESS * distances.flatten(0, 1), said.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        schedule.step()


def _distances(model: PreTrainedModel, images: Sequence[dict[str, Tensor]], targets: Tensor) -> Tensor:
    """[B, n, W]: squared, in units of the mean squared distance between two words."""
    unit = _squared(targets, targets).sum() / (len(targets) * (len(targets) - 1))
    return _squared(encode(model, images), targets) / unit


def _squared(points: Tensor, targets: Tensor) -> Tensor:
    """[.., W]: squared distances of points [.., C], without a tensor of [.., W, C]."""
    return points.square().sum(-1, keepdim=True) + targets.square().sum(-1) - 2 * points @ targets.T


@torch.no_grad()
def share_right(model: PreTrainedModel, pairs: Sequence[tuple[dict[str, Tensor], Tensor]], targets: Tensor) -> float:
    """The share of tokens that lie nearest to their own word."""
    right = total = 0
    for start in range(0, len(pairs), BATCH):
        images, said = zip(*pairs[start : start + BATCH], strict=True)
        nearest = _distances(model, images, targets).argmin(-1)
        right, total = right + int((nearest == torch.stack(said)).sum()), total + nearest.numel()
    return right / total
