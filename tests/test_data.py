"""data.py: formats, checks, labels, packing and batches, on clips that the generator writes and on the real one."""

import codecs
import functools
import itertools
import json
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor
from videos import REAL_ANNOTATIONS, needs_real_clip

from lib import data, tiny
from lib.data import IGNORED, BadSample, Collator, ConversationDataset, load_samples, packed_positions
from videonsa import model_class

# Tokens of "<86400.0 seconds>", a byte each, and of the signs around a patch.
LONGEST_TIME = 19


@pytest.fixture(scope="module")
def processor(tiny_repository):
    return AutoProcessor.from_pretrained(tiny_repository, trust_remote_code=True)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Folder with a.mp4 and sub/b.mp4 of 2 s, c.png, and what is broken in several ways."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "sub").mkdir()
    tiny.make_clip(folder / "a.mp4", seconds=2, width=112, height=84)
    tiny.make_clip(folder / "sub/b.mp4", seconds=2, width=84, height=56)
    Image.fromarray(np.full((56, 84, 3), 128, np.uint8)).save(folder / "c.png")
    whole = (folder / "a.mp4").read_bytes()
    (folder / "empty.mp4").touch()
    (folder / "noise.mp4").write_bytes(bytes(range(256)) * 16)
    (folder / "broken.png").write_bytes((folder / "c.png").read_bytes()[:40])
    bomb = bytearray((folder / "c.png").read_bytes())
    bomb[16:24] = struct.pack(">II", 20_000, 20_000)  # width and height
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (folder / "bomb.png").write_bytes(bomb)
    # The header is whole and the frames are not: found only when they are decoded.
    start = whole.index(b"mdat") + 4
    (folder / "damaged.mp4").write_bytes(whole[:start] + bytes(len(whole) - start))
    if whole.index(b"moov") > start:
        moov = whole.index(b"moov") - 4
        (folder / "damaged.mp4").write_bytes(whole[:start] + bytes(moov - start) + whole[moov:])
    return folder


def ask(question="<video>\nWhat?", answer="This.", **record):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **record}


def load(folder, processor, *records, name="data.json", **options):
    text = json.dumps(records) if name.endswith(".json") else "".join(json.dumps(r) + "\n" for r in records)
    (folder / name).write_text(text)
    return load_samples([str(folder / name)], processor, **options)


def parts(sample):
    """What a sample says and shows, in order."""
    return [
        (message["role"], part["type"], part[part["type"]])
        for message in sample.messages
        for part in message["content"]
    ]


def test_all_formats_mean_the_same(processor, media):
    a, c = str(media / "a.mp4"), str(media / "c.png")
    expected = [
        ("user", "video", a),
        ("user", "text", "What?"),
        ("assistant", "text", "This."),
        ("user", "text", "And"),
        ("user", "image", c),
        ("user", "text", "here?"),
        ("assistant", "text", "That."),
    ]
    second = [{"from": "human", "value": "And <image> here?"}, {"from": "gpt", "value": " That.\n"}]
    qwen = ask(video="a.mp4", image=["c.png"])
    qwen["conversations"] += second
    chat = [
        {"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "This."}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "And"}, {"type": "image"}, {"type": "text", "text": "here?"}],
        },
        {"role": "assistant", "content": "That."},
    ]
    tagged = [
        {"role": "user", "content": "<video>What?"},
        {"role": "assistant", "content": "This."},
        {"role": "user", "content": "And<image>here?"},
        {"role": "assistant", "content": "That."},
    ]
    records = [
        qwen,
        {**qwen, "video": f"file://{a}", "image": c},
        {"messages": chat, "images": ["c.png"]},
        {"messages": tagged, "videos": ["a.mp4"], "images": "c.png"},
    ]
    for name in ("data.json", "data.jsonl"):
        samples, drops = load(media, processor, *records, name=name)
        assert not drops and [parts(sample) for sample in samples] == [expected] * 4
    samples, drops = load(media, processor, records[:2])  # a list in place of a record: the packed form of Qwen-VL
    assert not drops and [parts(sample) for sample in samples] == [expected] * 2


def test_roles_in_capitals_windows_paths_and_urls_of_parts_are_understood(processor, media):
    turns = [{"from": "Human", "value": "<video>\nWhat?"}, {"from": "GPT", "value": "This."}]
    (sample,), drops = load(media, processor, {"conversations": turns, "video": "sub\\b.mp4"})
    b = str(media / "sub/b.mp4")
    assert not drops and parts(sample) == [
        ("user", "video", b),
        ("user", "text", "What?"),
        ("assistant", "text", "This."),
    ]

    text = {"type": "text", "text": "What?"}
    urls = [
        {"type": "video_url", "video_url": {"url": f"file://{b}", "fps": 2}},
        {"type": "video_url", "video_url": "sub/b.mp4"},
        {"type": "image_url", "image_url": {"url": "c.png", "detail": "low"}},
    ]
    answer = {"role": "Assistant", "content": "This."}
    records = [{"messages": [{"role": "USER", "content": [url, text]}, answer]} for url in urls]
    samples, drops = load(media, processor, *records)
    assert not drops and [parts(sample)[0][2] for sample in samples] == [b, b, str(media / "c.png")]
    assert samples[0].messages[0]["content"][0] == {"type": "video", "video": b, "fps": 2}
    assert samples[0].tokens < samples[1].tokens
    dataset = ConversationDataset(samples, processor, max_length=9999)
    assert [len(dataset[i][0]["input_ids"]) for i in range(3)] == [sample.tokens for sample in samples]


def test_more_drops_than_allowed_are_an_error_as_soon_as_it_is_sure(processor, media):
    records = [ask(f"{i}?") for i in range(8)] + [ask(video="gone.mp4"), ask(video="empty.mp4")]
    samples, drops = load(media, processor, *records, max_dropped=0.2)
    assert (len(samples), len(drops)) == (8, 2)
    message = (
        "--train_data: 2 of the first 10 records cannot be used, more than --max_dropped 0.1 allows of 10: "
        r"1 × missing file \(such as data.json\[8\]: missing file: gone.mp4 .*\); "
        r"1 × broken video \(such as .*empty.mp4 is empty\)"
        ". To go on without them, raise --max_dropped, up to 1$"
    )
    with pytest.raises(ValueError, match=message):
        load(media, processor, *records, max_dropped=0.1, split="train")
    with pytest.raises(ValueError, match="2 of the first 2 records .* allows of 10: 1 × "):
        load(media, processor, *records[::-1], max_dropped=0.1)
    # What the user excludes does not count.
    videos = [ask(video="a.mp4")] * 9
    samples, drops = load(media, processor, *videos, *records[:1], frames=(9, 20), max_dropped=0)
    assert (len(samples), len(drops)) == (1, 9) and drops[0].reason.startswith("outside --clip_frames: 8 frames, of 9")


def test_llava_video_178k_is_read_as_published(processor, media):
    record = ask("<image>\nWhat?", id="x", data_source="sub", video="b.mp4")
    samples, drops = load(media, processor, record)
    assert not drops and parts(samples[0])[0] == ("user", "video", str(media / "sub/b.mp4"))
    assert samples[0].id == "data.json[0] x"


def test_system_turns_several_videos_and_settings_of_a_part_are_kept(processor, media):
    videos = ["a.mp4", {"video": "sub/b.mp4", "fps": 2}, ["c.png", "c.png"]]
    record = ask("<video><video>Compare with <video>", video=videos)
    record["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    (sample,), drops = load(media, processor, record)
    assert parts(sample)[0] == ("system", "text", "Be brief.")
    assert [part["type"] for part in sample.messages[1]["content"]] == ["video", "video", "text", "video"]
    assert sample.messages[1]["content"][1] == {"type": "video", "video": str(media / "sub/b.mp4"), "fps": 2}
    assert parts(sample)[4][2] == [str(media / "c.png")] * 2


BAD = {
    "missing file: gone.mp4 .in .*media": ask(video="gone.mp4"),
    "missing file: b.mp4 .in .*media.* and .*other": ask(video="b.mp4", data_source="other"),
    "broken video: .*empty.mp4 is empty": ask(video="empty.mp4"),
    "broken video: .*noise.mp4": ask(video="noise.mp4"),
    "broken video: .*c.txt": ask(video="c.txt"),
    "broken image: .*broken.png": ask("<image>?", image="broken.png"),
    "the text has 1 <video> tag, the record 2 videos: put <video> where each belongs": ask(
        video=["a.mp4", "sub/b.mp4"]
    ),
    "the text has 2 <video> tags, the record 1 video": ask("<video><video>?", video="a.mp4"),
    "the text has 0 <video> tags, the record 1 video: put <video> where it belongs": ask("What?", video="a.mp4"),
    "the text has 1 <image> tag, the record 0 images": ask("<image>?"),
    "the text has 0 <image> tags, the record 1 image: put <image> where it belongs": ask(video="a.mp4", image="c.png"),
    "no assistant turn": {"messages": [{"role": "user", "content": "What?"}]},
    "an assistant turn is empty": ask("What?", " "),
    "must be an object, got str": "text",
    "needs `conversations` or `messages`": {"video": "a.mp4"},
    "`conversations` must be a list of turns": {"conversations": []},
    "a turn needs `from`, one of human": {"conversations": [{"from": "tool", "value": "x"}]},
    "`value` of a turn must be a text": {"conversations": [{"from": "human", "value": 3}]},
    "a part needs a type": {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
    "a path must be a text": ask(video=[7]),
    r"holds <\|im_end\|>": ask("What?<|im_end|>"),
    r"holds <\|video_pad\|>": ask("What?", "a <|video_pad|>"),
    "too long: .* tokens, of at most 300": ask("x" * 400),
    "cannot be checked: DecompressionBombError": ask("<image>?", image="bomb.png"),
    r"a turn needs `from`, .* got .'from': \['human'\]": {"conversations": [{"from": ["human"], "value": "x"}]},
    "broken video: start must be a number of seconds": ask(video={"video": "a.mp4", "start": "0:10"}),
    "cannot be checked: OSError: .*too long": ask("<image>?", image="x" * 5000),
    "cannot be checked: .*Text": ask("What\ud800?"),
    r"missing file: \\ud800.mp4": ask(video="\ud800.mp4", id="\ud800"),
    "8 frames, of 9 to 20": ask(video="a.mp4"),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_record_that_cannot_be_used_is_dropped_with_its_reason(processor, media, reason):
    (media / "c.txt").write_text("not a video")
    limits = {"max_length": 300} if "too long" in reason else {"frames": (9, 20)} if "frames" in reason else {}
    good = ask("Fine?", "Yes.")
    samples, drops = load(media, processor, good, BAD[reason], good, **limits)
    assert len(samples) == 2 and len(drops) == 1
    assert drops[0].id.startswith("data.json[1]") and (drops[0].id + drops[0].reason).encode()
    with pytest.raises(BadSample, match=reason):
        raise BadSample(drops[0].reason)


def test_a_damaged_line_is_dropped_and_a_damaged_file_refused(processor, media, tmp_path):
    good = json.dumps(ask("A?\u2028"), ensure_ascii=False).encode()  # a line separator, which ends no line
    (tmp_path / "lines.jsonl").write_bytes(b"\n".join([codecs.BOM_UTF8 + good, b"{oops", b"", b'{"\xff": 1}', good]))
    samples, drops = load_samples([str(tmp_path / "lines.jsonl")], processor)
    assert len(samples) == 2 and [drop.id for drop in drops] == ["lines.jsonl[1]", "lines.jsonl[2]"]
    assert all("not JSON" in drop.reason for drop in drops) and "utf-8" in drops[1].reason
    for content, message in (
        (b"{oops", "bad.json is not JSON: .*suffix .jsonl"),
        (b'["\xff"]', "bad.json is not JSON: 'utf-8' codec"),
        (codecs.BOM_UTF8 + b'{"a": 1}', "must hold a list of records"),
    ):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_samples([str(tmp_path / "bad.json")], processor)
    with pytest.raises(FileNotFoundError, match="gone.json does not exist"):
        load_samples([str(tmp_path / "gone.json%50")], processor)
    for spec in ("a.json%0", "a.json%101"):
        with pytest.raises(ValueError, match="PATH or PATH%N"):
            load_samples([spec], processor)
    with pytest.raises(ValueError, match="2 media roots for 1 data files"):
        load_samples(["a.json"], processor, roots=["x", "y"])


def test_a_share_of_a_file_is_drawn_by_the_seed_and_sets_have_their_own_roots(processor, media, tmp_path):
    (tmp_path / "one.json").write_text(json.dumps([ask(f"{i}?") for i in range(20)]))
    (tmp_path / "two.json").write_text(json.dumps([ask(video="b.mp4")]))
    specs = [f"{tmp_path}/one.json%25", f"{tmp_path}/two.json"]
    roots = [str(tmp_path), str(media / "sub")]
    drawn = [[s.id for s in load_samples(specs, processor, roots=roots, seed=seed)[0]] for seed in (0, 0, 1)]
    assert len(drawn[0]) == 6 and drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][-1] == "two.json[0]"


def test_labels_are_the_assistant_turns_token_by_token(processor, media):
    record = ask("<video>\nWhat is assistant?", "It says: assistant\nyes", video="a.mp4", image="c.png")
    parts = [{"type": "text", "text": text} for text in (" No, ", "but ", "yes. ")]
    record["conversations"] += [{"from": "human", "value": "<image> and?"}, {"from": "gpt", "value": parts}]
    (sample,), _ = load(media, processor, record)
    feature = ConversationDataset([sample], processor, max_length=9999)[0][0]
    tokenizer = processor.tokenizer
    video, image = (feature[f"{kind}_grid_thw"].prod().item() // 4 for kind in ("video", "image"))
    pad = {kind: "<|vision_start|>" + f"<|{kind}_pad|>" * n + "<|vision_end|>" for kind, n in
           (("video", video), ("image", image))}  # fmt: skip
    turns = [  # the text, and whether it has a loss
        ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n", False),
        (pad["video"] + "What is assistant?<|im_end|>\n<|im_start|>assistant\n", False),
        ("It says: assistant\nyes<|im_end|>", True),
        ("\n<|im_start|>user\n" + pad["image"] + "and?<|im_end|>\n<|im_start|>assistant\n", False),
        ("No, but yes.<|im_end|>", True),
        ("\n", False),
    ]
    ids, labels = [], []
    for text, counts in turns:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if counts else [IGNORED] * len(tokens)
    assert feature["input_ids"].tolist() == ids
    assert feature["labels"].tolist() == labels


@pytest.mark.parametrize("repository", ["tiny_repository", "qwen3_repository"])
def test_tokens_are_known_before_anything_is_decoded(request, repository, needles, media):
    processor = AutoProcessor.from_pretrained(request.getfixturevalue(repository), trust_remote_code=True)
    # Of the text that tells when frames are shown, a plan knows the most tokens that it can take.
    spare = LONGEST_TIME if repository == "qwen3_repository" else 0
    records = [ask(video="a.mp4"), ask("<video><video>", video=["a.mp4", ["c.png"] * 6]), ask("<image>", image="c.png")]
    least = {"max_tokens": 1034 + spare, "prefer": "frames"}
    own = ({"start": 0.5, "end": 1.5}, {"nframes": 4}, least, {"max_pixels": 3136})
    records += [ask(video={"video": "a.mp4", **settings}) for settings in own]
    samples, drops = load(media, processor, *records)
    assert all(sample.vision_tokens < samples[0].vision_tokens for sample in samples[3:])
    more, more_drops = load_samples([str(needles / "train.json")], processor)
    assert not drops and not more_drops
    dataset = ConversationDataset(samples + more, processor, max_length=9999)
    for sample, (feature,) in zip(dataset.samples, map(dataset.__getitem__, range(len(dataset))), strict=True):
        patches = int(feature["video_grid_thw"][:, 0].sum()) if "video_grid_thw" in feature else 0
        assert sample.tokens - spare * patches <= len(feature["input_ids"]) <= sample.tokens
        vision = sum(int(feature[g].prod(-1).sum()) // 4 for g in feature if g.endswith("thw"))
        assert sample.vision_tokens == vision > 0


@needs_real_clip
def test_the_real_clip_is_read_as_annotated(processor):
    (sample,), drops = load_samples([str(REAL_ANNOTATIONS)], processor)
    (feature,) = ConversationDataset([sample], processor, max_length=20_000)[0]
    assert not drops and len(feature["input_ids"]) == sample.tokens
    assert feature["video_grid_thw"].tolist() == [[245, 12, 20]]
    answer = processor.tokenizer.decode(feature["labels"][feature["labels"] != IGNORED])
    assert answer.startswith("The woman is pulled forward") and answer.endswith("floating on the surface.<|im_end|>")


def test_a_sample_that_fails_when_it_is_read_is_skipped_with_its_reason(processor, media, tmp_path):
    samples, drops = load(media, processor, ask("1?"), ask(video="damaged.mp4"), ask("3?"))
    assert len(samples) == 3 and not drops
    skipped = tmp_path / "new/skipped.jsonl"
    dataset = ConversationDataset(samples, processor, max_length=9999, skipped=skipped)
    assert dataset[1][0]["input_ids"].tolist() == dataset[2][0]["input_ids"].tolist()  # the next takes its place
    once = ConversationDataset(samples, processor, max_length=9999, multiple=2)
    assert [bool((once[i][0]["labels"] != IGNORED).any()) for i in range(len(once))] == [True, False, True, False]
    (line,) = map(json.loads, skipped.read_text().splitlines())
    assert line["id"] == "data.json[1]" and "damaged.mp4" in line["reason"]

    short = ConversationDataset(samples, processor, max_length=samples[0].tokens - 1, skipped=skipped)
    with pytest.raises(RuntimeError, match="none of 3 samples in a row could be read; the reasons are in .*skipped"):
        short[0]
    short.skipped = None
    with pytest.raises(RuntimeError, match="the reasons are in the warnings above"):
        short[0]
    packed = ConversationDataset(samples, processor, max_length=9999, capacity=9999)
    assert len(packed) == 1 and len(packed[0]) == 2  # the rest of a pack stays
    with pytest.raises(ValueError, match="no sample"):
        ConversationDataset([], processor, max_length=9999)


def test_a_file_that_disappears_is_skipped(processor, media, tmp_path):
    shutil.copyfile(media / "a.mp4", tmp_path / "a.mp4")
    samples, _ = load(tmp_path, processor, ask("1?"), ask(video="a.mp4"))
    (tmp_path / "a.mp4").unlink()
    assert len(ConversationDataset(samples, processor, max_length=9999)[1][0]["input_ids"]) == samples[0].tokens


def test_packs_hold_every_sample_once_and_waste_little():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 900, (500,), generator=generator).tolist()
    packs = data.plan_packs(lengths, 1000)
    assert sorted(i for pack in packs for i in pack) == list(range(500))
    assert all(sum(lengths[i] for i in pack) <= 1000 for pack in packs)
    assert len(packs) <= 1.05 * sum(lengths) / 1000 + 1
    assert data.plan_packs([5, 5, 5], 5) == [[0], [1], [2]]


@pytest.fixture(scope="module")
def mixed(needles, media):
    """Of a repository, its processor and items of a video, text, an image, two videos with an image, and text."""

    @functools.cache
    def make(folder):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        both = ask("<image><video><video>?", "Four of them.", video=["a.mp4", "sub/b.mp4"], image="c.png")
        records = [ask(video="sub/b.mp4"), ask("Hello?"), ask("<image>", image="c.png"), both, ask("?")]
        samples, _ = load(media, processor, *records)
        dataset = ConversationDataset(samples, processor, max_length=9999)
        return processor, [dataset[i] for i in range(len(dataset))]

    return make


BATCHES = itertools.product(
    ["tiny_repository"], ["paper", "dense"], [False, True], [False, True], [[0, 1, 2, 3, 4], [1, 4], [2, 1]]
)


@pytest.mark.parametrize(
    ("repository", "variant", "packed", "always_vision", "chosen"),
    [*BATCHES, *(("qwen3_repository", "paper", packed, True, [0, 1, 2, 3, 4]) for packed in (False, True))],
)
def test_a_batch_has_the_loss_and_gradients_of_its_samples_alone(
    request, mixed, repository, variant, packed, always_vision, chosen
):
    folder = request.getfixturevalue(repository)
    processor, mixed = mixed(folder)
    kind = AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type
    model = model_class(kind).from_pretrained(folder, nsa_variant=variant, dtype=torch.float32)
    model.train()

    def run(batch):
        if "lengths" in batch:
            positions = packed_positions(batch, model.model.get_rope_index)
            batch = {k: x for k, x in batch.items() if k not in ("lengths", "second_per_grid_ts")}
            batch["position_ids"] = positions
        model.zero_grad()
        loss = model(**batch, num_items_in_batch=1, use_cache=False).loss
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    alone = [run(Collator(processor)([mixed[i]])) for i in chosen]
    batch = Collator(processor, packed=packed, always_vision=always_vision)([mixed[i] for i in chosen])
    loss, gradients = run(batch)
    torch.testing.assert_close(loss, sum(x for x, _ in alone))
    for name, gradient in gradients.items():
        expected = sum(g.get(name, torch.zeros_like(gradient)) for _, g in alone)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4 * float(1 + expected.abs().max()))
    if always_vision:
        assert {"pixel_values", "pixel_values_videos"} <= set(batch)
        assert set(gradients) == {name for name, _ in model.named_parameters()}
