"""Records from folders, tars and Parquet files, and what is said of a data set that cannot be read."""

import io
import json
import tarfile

import datasets
import huggingface_hub
import pytest
import torch
from transformers import AutoProcessor

from lib import tiny
from lib.answering import Prompts, list_questions
from lib.data import ConversationDataset, load_samples
from lib.sources import Media, find_files


@pytest.fixture(scope="module")
def processor(tiny_repository):
    return AutoProcessor.from_pretrained(tiny_repository, trust_remote_code=True)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Folder with 0.mp4 to 2.mp4 of 1 to 3 s."""
    folder = tmp_path_factory.mktemp("media")
    for i in range(3):
        tiny.make_clip(folder / f"{i}.mp4", seconds=i + 1, width=84, height=56)
    return folder


def conversation(tag="<video>", answer="This.", **record):
    turns = [{"from": "human", "value": f"{tag}\nWhat?"}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **record}


def features(processor, samples):
    dataset = ConversationDataset(samples, processor, max_length=9999)
    return [dataset[i][0] for i in range(len(samples))]


def same_as_files(processor, media, samples, drops):
    """Whether samples are those of the three clips on disk, by their tokens and their pixels."""
    assert not drops
    (media / "all.json").write_text(json.dumps([conversation(video=f"{i}.mp4") for i in range(3)]))
    expected, _ = load_samples([str(media / "all.json")], processor)
    assert [sample.tokens for sample in samples] == [sample.tokens for sample in expected]
    for one, other in zip(features(processor, samples), features(processor, expected), strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def write_tar(path, files: dict[str, bytes], mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def shard(media, **record) -> dict[str, bytes]:
    files = {}
    for i in range(3):
        files[f"part/{i}.mp4"] = (media / f"{i}.mp4").read_bytes()
        files[f"part/{i}.json"] = json.dumps(conversation(**record)).encode()
    return files


def test_the_jsonl_files_of_a_folder_are_read_by_split(processor, tmp_path):
    for name in ("train-1", "train-2", "val", "more", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(conversation("", name)) + "\n")
    splits = {}
    for split in ("train", "eval", "test"):
        samples, _ = load_samples([str(tmp_path)], processor, split=split)
        splits[split] = [sample.id for sample in samples]
    assert splits["train"] == ["more.jsonl[0]", "train-1.jsonl[0]", "train-2.jsonl[0]"]
    assert splits["eval"] == ["val.jsonl[0]"] and splits["test"] == ["test.jsonl[0]"]
    for name in ("val", "test"):
        (tmp_path / f"{name}.jsonl").unlink()
    assert len(find_files(str(tmp_path), "eval")) == 3  # no split of its own: the whole folder


def test_a_tar_is_read_where_it_stands(processor, media, tmp_path):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    path = write_tar(folder / "data/train-0000.tar", shard(media))
    for spec in (path, folder):
        samples, drops = load_samples([str(spec)], processor, split="train")
        same_as_files(processor, media, samples, drops)
    assert samples[1].id == "train-0000.tar[1]"
    assert isinstance(samples[0].messages[0]["content"][0]["video"], Media)
    named = write_tar(tmp_path / "named.tar", {**shard(media, video="elsewhere/0.mp4"), "part/readme.txt": b"x"})
    samples, drops = load_samples([str(named)], processor)
    assert len(samples) == 1  # each sample has its own files only
    assert [drop.reason.split(" (")[0] for drop in drops[:2]] == ["missing file: elsewhere/0.mp4"] * 2
    assert drops[2].reason == "no readme.json beside readme.txt"

    # Questions are asked as of files, and workers read for themselves.
    samples, _ = load_samples([str(path)], processor)
    ((question, prompt),) = Prompts([list_questions(samples[0])], processor)[0]
    assert question.expected == "This." and prompt["video_grid_thw"].tolist()[0][0] > 0
    loader = torch.utils.data.DataLoader(
        ConversationDataset(samples, processor, max_length=9999), batch_size=None, num_workers=1
    )
    assert [len(feature["input_ids"]) for (feature,) in loader] == [sample.tokens for sample in samples]


@pytest.mark.parametrize("form", ["video of datasets", "list", "bytes", "tar as Parquet"])
def test_rows_of_parquet_with_videos_inside_are_samples(processor, media, tmp_path, form):
    clips = [(media / f"{i}.mp4").read_bytes() for i in range(3)]
    rows = [conversation() for _ in clips]
    for row, clip in zip(rows, clips, strict=True):
        if form == "video of datasets":
            row["video"] = {"bytes": clip, "path": "a.mp4"}
        elif form == "list":
            row["videos"] = [{"bytes": clip, "path": None}]
        elif form == "bytes":
            row["video"] = clip
        else:
            row.update(mp4=clip, json=json.dumps({"conversations": row.pop("conversations")}))
    folder = tmp_path / "set"
    folder.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(folder / "train-00000-of-00001.parquet", batch_size=2)
    (folder / "README.md").write_text("# A data set\n")
    before = {path.name for path in folder.rglob("*")}
    samples, drops = load_samples([str(folder)], processor, split="train")
    same_as_files(processor, media, samples, drops)
    assert {path.name for path in folder.rglob("*")} == before


def test_rows_of_parquet_with_chat_messages_have_only_their_own_keys(processor, media, tmp_path):
    video = {"type": "video", "video": str(media / "0.mp4"), "fps": 2.0}
    question = {"role": "user", "content": [video, {"type": "text", "text": "What?"}]}
    rows = [{"messages": [question, {"role": "assistant", "content": [{"type": "text", "text": "This."}]}]}]
    rows.append(
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello?"}]}, rows[0]["messages"][1]]}
    )
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "chat.parquet")
    samples, drops = load_samples([str(tmp_path / "chat.parquet")], processor)
    assert not drops and [len(sample.messages[0]["content"]) for sample in samples] == [2, 1]
    assert samples[0].messages[0]["content"][0] == video
    datasets.Dataset.from_list([conversation(video={"bytes": b"no video", "path": "a.mp4"})]).to_parquet(
        tmp_path / "broken.parquet"
    )
    samples, (drop,) = load_samples([str(tmp_path / "broken.parquet")], processor)
    assert not samples and drop.reason.startswith("broken video: a.mp4 in ")


def test_a_data_set_that_cannot_be_read_is_one_line(tmp_path, media):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/0.mp4").write_bytes((media / "0.mp4").read_bytes())
    for name, message in (
        ("gone.parquet", "data file gone.parquet does not exist"),
        ("gone/set.tar", "data file gone/set.tar does not exist"),
        ("no such thing", "data file no such thing does not exist"),
        (str(tmp_path / "mixed"), "folder: it holds .mp4 files; records are read from .json, .jsonl, .parquet, .tar"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
            find_files(name, "train")
        assert "\n" not in str(error.value)
    for name, content in (("a.tar", b"x" * 2000), ("a.parquet", b"x" * 2000)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not a "):
            load_samples([str(tmp_path / name)], None)
    packed = write_tar(tmp_path / "packed.tar", shard(media), "w:gz")
    with pytest.raises(ValueError, match="packed.tar is not a tar, or a compressed one"):
        load_samples([str(packed)], None)


def test_a_data_set_of_the_hub_without_a_network_is_one_line(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match="^someone/nothing:main: neither a file or folder here nor a data set"
    ) as error:
        find_files("someone/nothing:main", "train")
    assert "\n" not in str(error.value)
