"""The definition of a fast tokenizer: the tokens that a token depends on, and the same tokenizer with fewer tokens.

The smaller tokenizer still decodes encoded text to the same text, because every removed token is spelled by others: by
the tokens that it was merged from, down to characters or bytes, or by other pieces. Text whose tokens are all kept is
encoded as before, because every merge on the way to a kept token is kept, in the same order (BPE), or because the best
path through the pieces is kept and no new path is better (Unigram). Other tokenizers are refused.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer, PreTrainedTokenizerFast

from adapruner.base.errors import AdaPrunerError
from adapruner.model.places import quiet_transformers

# Settings that the class of a family has if the file has none.
_SETTINGS_OF_CLASS = ("padding_side", "truncation_side", "model_input_names")
_BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class TokenizerParts:
    """The parsed content of `tokenizer.json`."""

    definition: dict[str, Any]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerParts:
        """Reads the definition of a tokenizer; refuses one that cannot be rewritten exactly."""
        if not tokenizer.is_fast:
            raise _not_rewritable("it is not a fast tokenizer (one with a tokenizer.json)")
        parts = cls(json.loads(tokenizer.backend_tokenizer.to_str()))
        _check_model(parts)
        _check_decoder(parts)
        for step in _flat(parts.definition["post_processor"], "processors"):
            if step["type"] not in ("TemplateProcessing", "RobertaProcessing", "BertProcessing", "ByteLevel"):
                raise _not_rewritable(f"its post-processor {step['type']} is not known")
        return parts

    @property
    def model(self) -> dict[str, Any]:
        model: dict[str, object] = self.definition["model"]
        return model

    @property
    def is_unigram(self) -> bool:
        return bool(self.model["type"] == "Unigram")

    @cached_property
    def ids(self) -> dict[str, int]:
        """The ids of the tokens of the model, by token; without added tokens."""
        if self.is_unigram:
            return {piece: index for index, (piece, _) in enumerate(self.model["vocab"])}
        return dict(self.model["vocab"])

    @cached_property
    def texts(self) -> dict[int, str]:
        """All tokens by id, as they are written in the file; with added tokens."""
        return {index: text for text, index in self.ids.items()} | {
            added["id"]: added["content"] for added in self.definition["added_tokens"]
        }

    @cached_property
    def falls_back(self) -> bool:
        """True if every character that is not a token is encoded as bytes, and decoded again."""
        decoders = {decoder["type"] for decoder in _flat(self.definition["decoder"], "decoders")}
        has_bytes = self.ids.keys() >= set(_BYTE_TOKENS)
        return bool(self.model.get("byte_fallback")) and has_bytes and "ByteFallback" in decoders

    @cached_property
    def required(self) -> frozenset[int]:
        """Tokens that every text needs: added tokens, bytes for unknown characters, all characters if there are no such
        bytes or the model is Unigram, the unknown token, and tokens that the post-processor names."""
        needed = {added["id"] for added in self.definition["added_tokens"]}
        for step in _flat(self.definition["post_processor"], "processors"):
            if step["type"] == "TemplateProcessing":
                needed |= {index for special in step["special_tokens"].values() for index in special["ids"]}
            elif step["type"] != "ByteLevel":
                needed |= {step["sep"][1], step["cls"][1]}
        if self.definition["padding"]:
            needed.add(self.definition["padding"]["pad_id"])
        needed |= {self.ids[token] for token in _BYTE_TOKENS if token in self.ids and self.model.get("byte_fallback")}
        # A character that the decoder replaces would not be replaced if it were spelled by bytes. And Unigram reads
        # "<0xE2>" in a text as the byte, which a neighbouring character spelled by bytes would complete.
        steps = _flat(self.definition["decoder"], "decoders")
        replaced = [
            text or ""
            for step in steps
            for text in ((step.get("pattern") or {}).get("String"), step.get("content"), step.get("replacement"))
        ]
        touched, keeps_all = set("".join(replaced)), self.is_unigram or not self.falls_back
        needed |= {index for text, index in self.ids.items() if len(text) == 1 and (text in touched or keeps_all)}
        if self.is_unigram:
            unknown = self.model["unk_id"]
            lowest = min(range(len(self.ids)), key=lambda index: self.model["vocab"][index][1])
            # The score of an unknown character is the score of the worst piece, less a constant.
            needed |= {lowest} | ({unknown} if unknown is not None else set())
        elif self.model["unk_token"] is not None:
            needed |= {self.ids[token] for token in [self.model["unk_token"]] if token in self.ids}
        return frozenset(needed)

    def with_ancestors(self, token: int) -> set[int]:
        """A token with the tokens that it is merged from, in the order of BPE; the token alone if merging does not give
        it."""
        text = self.texts.get(token)
        if self.is_unigram or text is None or self.ids.get(text) != token:
            return {token}
        symbols, merged = [self.ids.get(sign, -1) for sign in text], {token}
        if -1 in symbols:
            return {token}
        merged |= set(symbols)
        while len(symbols) > 1:
            ranked = [
                (*self._merges[pair], at) for at, pair in enumerate(itertools.pairwise(symbols)) if pair in self._merges
            ]
            if not ranked:
                return {token}
            _, result, at = min(ranked, key=lambda merge: (merge[0], merge[2]))
            symbols[at : at + 2] = [result]
            merged.add(result)
        return merged if symbols == [token] else {token}

    @cached_property
    def _merges(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Rank and result of every pair that is merged."""
        return {
            (self.ids[left], self.ids[right]): (rank, self.ids[left + right])
            for rank, (left, right) in enumerate(self.model["merges"])
        }

    def rewritten(self, new_ids: Mapping[int, int]) -> dict[str, object]:
        """The definition with only the tokens that have a new id, see `cut_tokenizer`."""
        model = dict(self.model)
        if self.is_unigram:
            model["vocab"] = [entry for index, entry in enumerate(self.model["vocab"]) if index in new_ids]
            model["unk_id"] = None if model["unk_id"] is None else new_ids[model["unk_id"]]
        else:
            kept = {text: new_ids[index] for text, index in self.ids.items() if index in new_ids}
            model["vocab"] = dict(sorted(kept.items(), key=lambda item: item[1]))
            model["merges"] = [
                [left, right]
                for left, right in self.model["merges"]
                if left in kept and right in kept and left + right in kept
            ]
        padding = self.definition["padding"]
        return self.definition | {
            "model": model,
            "added_tokens": [added | {"id": new_ids[added["id"]]} for added in self.definition["added_tokens"]],
            "post_processor": _with_new_ids(self.definition["post_processor"], new_ids),
            "padding": padding and padding | {"pad_id": new_ids[padding["pad_id"]]},
        }


def cut_tokenizer(tokenizer: Tokenizer, new_ids: Mapping[int, int]) -> Tokenizer:
    """The tokenizer with only the tokens that have a new id. Everything else is unchanged: normalization, splitting,
    special tokens, chat templates, settings.

    Args:
        new_ids: by old id; ascending, without gaps.
    """
    parts = TokenizerParts.of(tokenizer)
    definition = parts.rewritten(new_ids)
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        tokenizer.save_pretrained(folder)
        _write_json(Path(folder) / "tokenizer.json", definition)
        settings = Path(folder) / "tokenizer_config.json"
        # Classes of a family rebuild their tokenizer; this one uses the file as it is.
        fields = json.loads(settings.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        fields |= {name: getattr(tokenizer, name) for name in _SETTINGS_OF_CLASS}
        _write_json(settings, {name: value for name, value in fields.items() if name != "added_tokens_decoder"})
        cut: Tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    cut.name_or_path = tokenizer.name_or_path
    _check_cut(tokenizer, cut, definition, new_ids, parts)
    return cut


def spelling_of(tokenizer: Tokenizer, cut: Tokenizer) -> dict[int, tuple[int, ...]] | None:
    """How a tokenizer with fewer tokens spells each token of the whole one, by their numbers; None if it has the same
    tokens, or some that the whole one has not."""
    known, texts = tokenizer.get_vocab(), cut.get_vocab()
    if texts == known or not texts.keys() <= known.keys() or not cut.is_fast:
        return None
    model = cut.backend_tokenizer.model
    return {
        token: (texts[text],) if text in texts else tuple(piece.id for piece in model.tokenize(text))
        for text, token in known.items()
    }


def tokens_of_both(tokenizer: Tokenizer, cut: Tokenizer) -> frozenset[int]:
    """The tokens of a tokenizer that one with fewer of its tokens has too."""
    known = tokenizer.get_vocab()
    return frozenset(known[text] for text in cut.get_vocab())


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _check_cut(
    before: Tokenizer, cut: Tokenizer, written: dict[str, object], new_ids: Mapping[int, int], parts: TokenizerParts
) -> None:
    loaded = json.loads(cut.backend_tokenizer.to_str())
    changed = [name for name in written if loaded[name] != written[name]]
    texts = cut.backend_tokenizer.get_vocab(with_added_tokens=True)
    if changed or texts != {parts.texts[old]: new for old, new in new_ids.items() if old in parts.texts}:
        raise _not_rewritable(f"read again, it differs in {', '.join(changed) or 'its tokens'}")
    settings = {name: (getattr(before, name), getattr(cut, name)) for name in _SETTINGS_OF_CLASS}
    settings |= {name: (token, cut.special_tokens_map.get(name)) for name, token in before.special_tokens_map.items()}
    for name, (wanted, read) in settings.items():
        if wanted != read:
            raise _not_rewritable(f"read again, its {name} is another")


def _not_rewritable(reason: str) -> AdaPrunerError:
    return AdaPrunerError(
        f"this tokenizer cannot be rewritten exactly with fewer tokens: {reason}; BPE over bytes, BPE that falls back"
        " to bytes and Unigram can be: keep all tokens of this model, or choose another one"
    )


def _check_model(parts: TokenizerParts) -> None:
    model = parts.model
    if model["type"] not in ("BPE", "Unigram"):
        raise _not_rewritable(f"its model is {model['type']}")
    if model["type"] == "BPE":
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            raise _not_rewritable("it marks the insides or ends of words")
        if model.get("dropout"):
            raise _not_rewritable(f"it encodes text at random (dropout {model['dropout']})")
        return
    # Added tokens are found before pieces, and bytes for unknown characters are kept.
    pieces = parts.ids.keys() - {added["content"] for added in parts.definition["added_tokens"]}
    pieces -= set(_BYTE_TOKENS) if model.get("byte_fallback") else set()
    signs = {sign for piece in pieces for sign in piece} - parts.ids.keys()
    if signs:
        raise _not_rewritable(f"pieces hold characters that are no pieces themselves ({''.join(sorted(signs))[:20]!r})")


def _check_decoder(parts: TokenizerParts) -> None:
    """Refuses decoders whose text is not that of the tokens in sequence."""
    decoders = list(_flat(parts.definition["decoder"], "decoders"))
    if not decoders:
        raise _not_rewritable("it has no decoder, and writes spaces between tokens")
    # Tokens have spaces only at their beginning; the decoder drops all spaces of the first token.
    splitters = _flat(parts.definition["pre_tokenizer"], "pretokenizers")
    splits_at_spaces = any(splitter["type"] == "Metaspace" and splitter["split"] for splitter in splitters)
    joined = False
    for decoder in decoders:
        match decoder:
            case {"type": "Fuse" | "ByteLevel"}:
                joined = True
            case {"type": "ByteFallback"}:
                pass
            case {"type": "Replace", "pattern": {"String": pattern}} if joined or len(pattern) == 1:
                pass
            case {"type": "Strip"} if joined:
                pass
            case {"type": "Metaspace"} if joined or decoder["prepend_scheme"] == "never" or splits_at_spaces:
                pass
            case _:
                raise _not_rewritable(f"its decoder ({decoder['type']}) looks at single tokens")


def _with_new_ids(post_processor: Any, new_ids: Mapping[int, int]) -> Any:
    if post_processor is None:
        return None
    if post_processor["type"] == "Sequence":
        return post_processor | {"processors": [_with_new_ids(step, new_ids) for step in post_processor["processors"]]}
    if post_processor["type"] == "TemplateProcessing":
        special = {
            name: token | {"ids": [new_ids[index] for index in token["ids"]]}
            for name, token in post_processor["special_tokens"].items()
        }
        return post_processor | {"special_tokens": special}
    named = {name: post_processor[name] for name in ("sep", "cls") if name in post_processor}
    return post_processor | {name: [text, new_ids[index]] for name, (text, index) in named.items()}


def _flat(component: Any, parts: str) -> Iterator[dict[str, Any]]:
    """A component of a definition, or the components of a sequence, in order."""
    if component is None:
        return
    if component["type"] != "Sequence":
        yield component
        return
    for step in component[parts]:
        yield from _flat(step, parts)
