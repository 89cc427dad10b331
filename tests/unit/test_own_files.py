"""A model folder's links are not followed to other places of this machine."""

import pytest
import tokenizers

from hosl.errors import FolderError
from hosl.split.export import copy_companions
from hosl.tasks import TextTokenizer


def _tokenizer(folder):
    folder.mkdir(parents=True)
    model = tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("target", ["absolute", "relative", "parent folder is a link"])
def test_a_tokenizer_that_is_a_link_out_of_its_folder_is_not_followed(tmp_path, target):
    elsewhere, folder = _tokenizer(tmp_path / "elsewhere"), tmp_path / "model"
    folder.mkdir()
    link = {
        "absolute": elsewhere,
        "relative": "../elsewhere/tokenizer.json",
        "parent folder is a link": "in/tokenizer.json",
    }
    (folder / "in").symlink_to(elsewhere.parent)
    (folder / "tokenizer.json").symlink_to(link[target])
    with pytest.raises(FolderError, match="out of the model's folder, and is not followed"):
        TextTokenizer.load(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "config.json"])
def test_a_file_beside_the_tokenizer_that_is_a_link_out_is_not_followed(tmp_path, name):
    folder = _tokenizer(tmp_path / "model").parent
    (tmp_path / "settings.json").write_text('{"pad_token_id": 7}')
    (folder / name).symlink_to(tmp_path / "settings.json")
    with pytest.raises(FolderError, match="is not followed"):
        TextTokenizer.load(folder)


@pytest.mark.parametrize("name", ["vocab.txt", "merges.txt", "tokenizer.json"])
def test_a_private_file_is_not_copied_by_way_of_a_link(tmp_path, name):
    folder, out = tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    (tmp_path / "private").write_text("secret")
    (folder / name).symlink_to(tmp_path / "private")
    copy_companions(folder, out)
    assert list(out.iterdir()) == []


def test_links_within_the_folder_and_those_of_the_hubs_cache_are_followed(tmp_path):
    inside = _tokenizer(tmp_path / "model" / "kept")
    (tmp_path / "model" / "tokenizer.json").symlink_to(inside)
    assert TextTokenizer.load(tmp_path / "model").encode("a", 8) == (1,)
    cache = tmp_path / "hub" / "models--a--b"
    blob = _tokenizer(cache / "blobs")
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/tokenizer.json")
    assert TextTokenizer.load(snapshot).encode("a", 8) == (1,)
    (tmp_path / "whole-folder").symlink_to(tmp_path / "model")
    assert TextTokenizer.load(tmp_path / "whole-folder").encode("a", 8) == (1,)
    assert blob.is_file()
