"""What `--data REF` and a recipe's data section mean, checked without opening any file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from pydantic import ValidationError

from compress.data.grammar import parse_source
from compress.data.references import DataOptions, ImageFolder, NpzFile, SplitReference, Step, parse_reference
from compress.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("digits", {"type": "builtin", "name": "digits"}),
        ("digits?take=5&shuffle=true", {"type": "builtin", "name": "digits", "take": 5, "shuffle": True}),
        ("npz:a.npz", {"type": "npz", "path": "a.npz"}),
        ("dir/a.npz", {"type": "npz", "path": "dir/a.npz"}),
        (
            "npz:a.npz?x=left,right&y=label&take=1000",
            {"type": "npz", "path": "a.npz", "x": ["left", "right"], "y": "label", "take": 1000},
        ),
        ("npz:a.npz?x=l:left,r:right", {"type": "npz", "path": "a.npz", "x": {"l": "left", "r": "right"}}),
        (
            "npz:a.npz?rescale=1/255&offset=-1&expand_dims=-1",
            {
                "type": "npz",
                "path": "a.npz",
                "preprocess": [{"rescale": "1/255", "offset": -1}, {"expand_dims": -1}],
            },
        ),
        ("npz:a.npz?x=a%26b", {"type": "npz", "path": "a.npz", "x": "a&b"}),
        ("folder:images?size=96x64", {"type": "image_folder", "path": "images", "size": "96x64"}),
        ("./images", {"type": "image_folder", "path": "./images"}),
        ("kws.data:make", {"type": "python", "factory": "kws.data:make"}),
        (
            "python:kws:make?n=3&name=abc&take=7",
            {"type": "python", "factory": "kws:make", "args": {"n": 3, "name": "abc", "take": 7}},
        ),
    ],
)
def test_parses(text, expected):
    assert parse_source(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nzp:a.npz", "did you mean `npz:`"),
        ("foldr:images", "did you mean `folder:`"),
        ("digts", "did you mean `digits`"),
        ("hf:someone/set", "unknown kind of data 'hf:'"),
        ("npz:", "expected a name after `npz:`"),
        ("", "expected a reference to data"),
        ("python:not a function", "python:package.module:function"),
        ("npz:a.npz?take", "expected key=value"),
        ("npz:a.npz?take=1&take=2", "`take` is given twice"),
        ("npz:a.npz?taek=1", "unknown option `taek`; did you mean `take`?"),
        ("npz:a.npz?take=0", "take: Input should be greater than or equal to 1. Received: 0"),
        ("npz:a.npz?rescale=abc", "rescale: expected a number"),
        ("folder:images", "`size` is required, such as ?size=96x96"),
        ("folder:images?size=96", "expected height x width such as `96x96`"),
        ("digits?split=validation", "no validation split"),
    ],
)
def test_says_what_is_wrong(text, words):
    with pytest.raises(UsageError) as caught:
        parse_reference(text)
    assert words in str(caught.value)
    assert "Received" in str(caught.value) or "unknown option" in str(caught.value) or "such as" in str(caught.value)


def test_existing_folder_needs_no_prefix(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_source("photos") == {"type": "image_folder", "path": "photos"}


def test_reference_gives_train_and_test():
    options = parse_reference("npz:a.npz?take=3")
    assert options.train == NpzFile(path="a.npz", take=3, split="train")
    assert options.test == NpzFile(path="a.npz", take=3, split="test")
    assert options.validation is None
    assert options.unlabelled is None
    assert DataOptions.model_validate("npz:a.npz?take=3") == options


def test_reference_with_split_gives_that_split():
    assert parse_reference("digits?split=train").test is None
    assert parse_reference("digits?split=train").train.split == "train"
    everything = parse_reference("npz:a.npz?split=all")
    assert everything.train is None
    assert everything.test.split == "all"


def test_command_line_beats_reference():
    options = parse_reference("npz:a.npz?take=3&rescale=1/255&flatten=true", take=9, skip=2, rescale="1/16")
    assert (options.train.take, options.train.skip) == (9, 2)
    assert options.train.preprocess == (Step(rescale=0.0625), Step(flatten=True))


def test_splits_may_be_text():
    options = DataOptions.model_validate({"train": "npz:a.npz?x=images", "test": {"type": "ref", "of": "train"}})
    assert options.train == NpzFile(path="a.npz", x="images")
    assert options.test == SplitReference(of="train")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"trian": "digits"}, "Extra inputs"),
        ({"train": {"type": "npz", "path": "a.npz", "pth": 1}}, "Extra inputs"),
        ({"train": {"type": "nzp", "path": "a.npz"}}, "did you mean `npz`"),
        ({"train": {"path": "a.npz"}}, "`type` is required. Known: builtin, npz"),
        ({"train": "npz:a.npz?taek=1"}, "unknown option `taek`; did you mean `take`"),
        ({"train": {"type": "npz", "path": ""}}, "at least 1 character"),
        ({"train": {"type": "npz", "path": "a.npz", "x": []}}, "at least one array"),
        ({"train": {"type": "npz", "path": "a.npz", "skip": -1}}, "greater than or equal to 0"),
        ({"train": {"type": "python", "factory": "os.system"}}, "match pattern"),
        ({"train": {"type": "image_folder", "path": "a", "size": [0, 8]}}, "greater than or equal to 1"),
        ({"train": {"type": "image_folder", "path": "a", "size": [8, 8], "channels": 2}}, "1 or 3"),
        ({"train": {"type": "ref", "of": "train"}}, "refers to itself: train -> train"),
        ({"train": {"type": "ref", "of": "test"}}, "refers to `test`, which the data section does not have"),
        ({"validation": "digits"}, "no validation split"),
        ({"train": {"type": "builtin", "name": "digits", "preprocess": [{}]}}, "exactly one key"),
        (
            {"train": {"type": "builtin", "name": "digits", "preprocess": [{"rescale": 2, "flatten": True}]}},
            "exactly one key",
        ),
        (
            {"train": {"type": "builtin", "name": "digits", "preprocess": [{"expand_dims": 0}]}},
            "must not be 0",
        ),
    ],
)
def test_section_is_refused(section, words):
    with pytest.raises(ValidationError, match=words.replace("->", "-.")):
        DataOptions.model_validate(section)


def test_reference_cycle_is_refused():
    with pytest.raises(ValidationError, match=r"train -> test -> train"):
        DataOptions.model_validate({"train": {"type": "ref", "of": "test"}, "test": {"type": "ref", "of": "train"}})


def test_resolve_counts_from_the_folder():
    options = DataOptions.model_validate(
        {
            "train": "npz:sub/a.npz",
            "test": {"type": "image_folder", "path": "/data/images", "size": "8x8"},
            "unlabelled": {"type": "ref", "of": "train"},
        }
    )
    resolved = options.resolve(Path("/recipes"))
    assert resolved.train.path == "/recipes/sub/a.npz"
    assert resolved.test == ImageFolder(path="/data/images", size=(8, 8))
    assert resolved.unlabelled == options.unlabelled
    assert resolved.resolve(Path("/elsewhere")) == resolved


def test_plain_values_give_the_same_options():
    options = DataOptions.model_validate(
        {
            "train": "npz:a.npz?x=l:left,r:right&rescale=1/255&one_hot=10",
            "validation": {"type": "ref", "of": "train", "take": 5},
            "test": "folder:images?size=8x8&classes=b,a",
            "unlabelled": "pkg:make?n=2",
        }
    )
    assert DataOptions.model_validate(options.model_dump(mode="json")) == options


def test_json_schema_takes_text_and_mappings():
    schema = DataOptions.model_json_schema()
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate("digits")
    validator.validate({"train": "npz:a.npz"})
    validator.validate({"train": {"type": "npz", "path": "a.npz", "preprocess": [{"rescale": 0.5}]}})
    validator.validate({"train": {"type": "image_folder", "path": "a", "size": "96x96"}})
    assert not validator.is_valid({"train": {"type": "npz", "path": "a.npz", "pth": "b"}})
    assert not validator.is_valid({"training": "digits"})
    described = schema["$defs"]["NpzFile"]["properties"]["take"]["description"]
    assert described == "Samples to keep after those skipped; by default all."


def test_imports_nothing_heavy():
    code = "import sys, compress.data.references as r; r.parse_reference('digits'); " + (
        "print([m for m in ('numpy', 'keras', 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
