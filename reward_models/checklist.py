"""Checklist reward: yes/no questions about the image, answered by any model that gives a probability of "yes".

Sources: TIFA (arXiv 2303.11897) for questions as a measure; Davidsonian scene graphs (arXiv 2310.18235) for questions
that make sense only after a yes to another one; VQAScore (arXiv 2404.01291) for the probability as the score; the
checklist of PEARL (arXiv 2511.18437) as a gate; T2I-CompBench (arXiv 2307.06350) for BLIP's share of "yes".

VQAScore's question is ``{"questions": ["Does this figure show \\"PROMPT\\"?"]}`` with the caption in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import weights
from .plug_ins import plug_in
from .preprocess import Preprocessing
from .protocol import Metadata, RewardError, RewardResult, RewardSpec
from .torchvision_ops import ready

# (M, 3, H, W) in [0, 1] and M questions -> M probabilities of "yes", NaN where there is no answer
Answerer = Callable[[Tensor, list[str]], Sequence[float] | Tensor]
BLIP = "Salesforce/blip-vqa-capfilt-large"


@dataclass(frozen=True)
class Question:
    """One line of a checklist.

    Attributes:
        text: the question.
        yes: whether "yes" is the right answer.
        needs: numbers of earlier questions; unless all of these are right (above 1/2), this one counts as wrong.
        weight: positive; in the mean as a factor, in the product as an exponent.
    """

    text: str
    yes: bool = True
    needs: tuple[int, ...] = ()
    weight: float = 1.0


def parse_questions(metadata: Metadata) -> list[Question] | str:
    """The checklist of ``metadata["questions"]``, or what is wrong with it.

    Each entry is a text or {"question": text, "answer": "yes" or "no", "needs": [numbers], "weight": w}; a value of
    None counts as absent.
    """
    entries: Any = metadata.get("questions")
    if not isinstance(entries, list | tuple) or not entries:
        return "the metadata has no 'questions'"
    questions: list[Question] = []
    for i, entry in enumerate(entries):
        entry = {"question": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not str(entry.get("question") or "").strip():
            return f"question {i} is {entry!r}, expected a text or an object with 'question'"
        told = {key: value for key, value in entry.items() if value is not None}
        answer, needs, weight = told.get("answer", "yes"), told.get("needs", ()), told.get("weight", 1.0)
        if isinstance(answer, bool):
            answer = "yes" if answer else "no"  # YAML reads yes and no as booleans
        if answer not in ("yes", "no"):
            return f"question {i} expects {answer!r}, which is neither 'yes' nor 'no'"
        if not isinstance(needs, list | tuple) or not all(isinstance(n, int) and 0 <= n < i for n in needs):
            return f"question {i} needs {needs!r}, expected numbers of earlier questions"
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            return f"question {i} has weight {weight!r}, expected a positive number"
        questions.append(Question(str(entry["question"]), answer == "yes", tuple(needs), float(weight)))
    return questions


def marks(probabilities: Sequence[float], questions: Sequence[Question]) -> list[float]:
    """Probability that each question is answered rightly, 0 for those whose needs are not met; NaN stays NaN.

    Args:
        probabilities: of "yes", in [0, 1].
        questions: as many.
    """
    right: list[float] = []
    for p, question in zip(probabilities, questions, strict=True):
        own = p if question.yes else 1 - p
        needed = [right[i] for i in question.needs]
        if any(math.isnan(mark) for mark in needed):
            own = math.nan
        elif not all(mark > 0.5 for mark in needed):
            own = 0.0
        right.append(own)
    return right


def product(values: Sequence[float], exponents: Sequence[float]) -> float:
    """``prod_i v_i^w_i`` of values in [0, 1]."""
    return math.prod(v**w for v, w in zip(values, exponents, strict=True))


def mean(values: Sequence[float], shares: Sequence[float]) -> float:
    """``sum_i w_i v_i / sum_i w_i``."""
    return sum(v * w for v, w in zip(values, shares, strict=True)) / sum(shares)


def geometric(values: Sequence[float], shares: Sequence[float]) -> float:
    """``(prod_i v_i^w_i)^(1 / sum_i w_i)``; 0 as soon as one value is."""
    return product(values, [w / sum(shares) for w in shares])


def least(values: Sequence[float], shares: Sequence[float]) -> float:
    """The smallest value; weights are not read."""
    return min(values) if not any(map(math.isnan, values)) else math.nan


RULES = {"mean": mean, "product": product, "geometric": geometric, "least": least}


class BlipAnswerer:
    """BLIP-VQA: P(yes) / (P(yes) + P(no)) of the first token of the answer, as T2I-CompBench takes it.

    Args:
        path: hub id or folder of a ``BlipForQuestionAnswering`` with its tokenizer.
        device: where to compute.
        chunk: pairs of image and question per forward.
        antialias: of the bicubic resize to the model's square on float tensors (the published one is Pillow's).

    Raises:
        ValueError: no such model, or one without single tokens for "yes" and "no" and for the start of a question.
    """

    def __init__(
        self, path: str | Path = BLIP, *, device: str | torch.device = "cpu", chunk: int = 16, antialias: bool = True
    ) -> None:
        folder = weights.locate_folder(path, ("*.json", "*.txt", "*.safetensors"))
        ready()
        from transformers import AutoTokenizer, BlipForQuestionAnswering  # heavy

        model: Any
        model, digest = weights.pretrained(BlipForQuestionAnswering, folder)
        self.model, self.device, self.chunk = model.to(device), torch.device(device), chunk
        self.version = f"blip-vqa {digest[:12]}"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        found = [self.tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("yes", "no")]
        words = int(model.config.text_config.vocab_size)
        known = all(len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id for ids in found)
        if not known or model.decoder_start_token_id + 1 >= words:
            raise ValueError(
                f"got a model {str(path)!r} of {words} words whose tokenizer makes {found} of 'yes' and 'no', expected "
                f"one token each, and one after number {model.decoder_start_token_id}. Give a BLIP-VQA model."
            )
        self.yes, self.no = (ids[0] for ids in found)
        self.start = int(model.decoder_start_token_id)  # [DEC]
        self.encode = self.start + 1  # [ENC], which BLIP puts in place of [CLS] and transformers leaves out
        self.fit = Preprocessing(int(model.config.vision_config.image_size), fit="squeeze", antialias=antialias)
        # BLIP's own limit; always padded to it, so that an answer does not depend on the other questions of its call
        self.length = min(35, int(model.config.text_config.max_position_embeddings))

    @torch.no_grad()
    def __call__(self, images: Tensor, questions: list[str]) -> Tensor:
        """(M,) probabilities."""
        parts = [torch.zeros(0)]
        for i in range(0, len(questions), self.chunk):
            pixels = self.fit(images[i : i + self.chunk].to(self.device).float())
            tokens = self.tokenizer(
                questions[i : i + self.chunk], padding="max_length", truncation=True, max_length=self.length,
                return_tensors="pt",
            ).to(self.device)  # fmt: skip
            tokens["input_ids"][:, 0] = self.encode
            seen = self.model.vision_model(pixel_values=pixels).last_hidden_state
            everywhere = torch.ones(seen.shape[:2], dtype=torch.long, device=self.device)
            read = self.model.text_encoder(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                encoder_hidden_states=seen,
                encoder_attention_mask=everywhere,
            ).last_hidden_state
            start = torch.full((len(pixels), 1), self.start, device=self.device)
            logits = self.model.text_decoder(
                input_ids=start, encoder_hidden_states=read, encoder_attention_mask=tokens["attention_mask"]
            ).logits[:, -1]
            # the softmax over the whole vocabulary cancels in the ratio
            parts.append(torch.sigmoid(logits[:, self.yes] - logits[:, self.no]).float().cpu())
        return torch.cat(parts)


def load_answerer(spec: str | Answerer | None, device: str | torch.device = "cpu") -> Answerer:
    """None for BLIP-VQA of the published name, "module:attribute" for a plug-in (a function, or a class without
    arguments whose objects can be called), any other text is a hub id or folder of a BLIP-VQA model.

    Raises:
        ValueError: the name leads nowhere.
    """
    if spec is not None and not isinstance(spec, str):
        return spec
    if spec is None or ":" not in spec:
        return BlipAnswerer(spec or BLIP, device=device)
    return plug_in(spec, "answerer", "'module:attribute' that maps images and questions to probabilities of yes")


class ChecklistReward:
    """How surely the questions of the metadata are answered rightly, in [0, 1].

    ``parts``: "checklist-passed", the share of questions answered rightly (above 1/2), to use as a gate. ``reasons``
    name the wrong ones. An image is missing without a readable checklist, or if a question got no answer.

    Args:
        rule: "mean", "product", "geometric" or "least" of the questions' marks.
        answerer: see ``load_answerer``.
        device: where BLIP computes.

    Raises:
        ValueError: unknown rule, or the answerer cannot be loaded.
    """

    def __init__(
        self, rule: str = "mean", answerer: str | Answerer | None = None, *, device: str | torch.device = "cpu"
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"got checklist rule {rule!r}, expected one of {', '.join(RULES)}. Use one of these.")
        self.rule = rule
        self.answerer = load_answerer(answerer, device)
        self.spec = RewardSpec(
            name="checklist",
            version=f"1, {rule}, {getattr(self.answerer, 'version', 'own answerer')}",
            range=(0.0, 1.0),
            licence="see the answerer's",
            preprocessing="8-bit; the answerer's own",
        )

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; prompts are not read."""
        lists = [parse_questions(given) for given in metadata]
        asked = [(i, q.text) for i, questions in enumerate(lists) if not isinstance(questions, str) for q in questions]
        answers = iter(self._ask(images[[i for i, _ in asked]], [text for _, text in asked]) if asked else ())
        values: list[tuple[float, float]] = []
        reasons: list[str | None] = []
        for questions in lists:
            if isinstance(questions, str):
                values.append((math.nan, math.nan))
                reasons.append(questions)
                continue
            got = marks([next(answers) for _ in questions], questions)
            silent = [q.text for q, mark in zip(questions, got, strict=True) if math.isnan(mark)]
            wrong = [q.text for q, mark in zip(questions, got, strict=True) if mark <= 0.5]
            passed = math.nan if silent else 1 - len(wrong) / len(got)
            values.append((RULES[self.rule](got, [q.weight for q in questions]), passed))
            said = [f"no answer to {text!r}" for text in silent] or [f"wrong: {text!r}" for text in wrong]
            reasons.append("; ".join(said) or None)
        value, passed_all = torch.tensor(values, dtype=torch.float32).reshape(-1, 2).unbind(1)
        return RewardResult(value, {"checklist-passed": passed_all}, reasons)

    def _ask(self, images: Tensor, questions: list[str]) -> list[float]:
        answers = [float(p) for p in self.answerer(images, questions)]
        if len(answers) != len(questions) or any(not (math.isnan(p) or 0 <= p <= 1) for p in answers):
            raise RewardError(
                f"the answerer gave {len(answers)} answers to {len(questions)} questions, between "
                f"{min(answers, default=math.nan)} and {max(answers, default=math.nan)}, expected as many "
                "probabilities of yes in [0, 1] (NaN: no answer)."
            )
        return answers
