"""Clips with captions and questions."""

import pytest
from PIL import Image

from mplug_jax.data.clips import load_clip
from mplug_jax.data.records import SourceError
from mplug_jax.data.sources import build_source


@pytest.fixture
def root(data_root):
    """`videos/` holds two files and a folder of three frames."""
    (data_root.path / "videos" / "video2").mkdir(parents=True)
    for name in ("video0.mp4", "video1.mp4", "clip.webm"):
        (data_root.path / "videos" / name).write_bytes(b"a video")
    for shade in range(3):
        picture = Image.new("RGB", (8, 8), (50 * shade,) * 3)
        picture.save(data_root.path / "videos" / "video2" / f"{shade}.png")
    return data_root


def load(root, content, **spec):
    root.write("data.jsonl", content)
    spec = {"kind": "video", "path": "data.jsonl", "videos": "videos", **spec}
    return build_source(spec, root.path)


def names(root, source):
    assert all(record["video"] == record["image"] for record in source)
    return [record["video"].removeprefix(f"{root.path}/videos/") for record in source]


def test_msrvtt_captions_are_grouped_by_clip(root):
    rows = (
        {"clip_name": "video1", "caption": "one", "retrieval_key": "ret0"},
        {"clip_name": "video0", "caption": "zero"},
        {"clip_name": "video1", "caption": ["another", " a third "]},
    )
    source = load(root, rows)
    assert names(root, source) == ["video1.mp4", "video0.mp4"]
    assert [record["captions"] for record in source] == [["one", "another", "a third"], ["zero"]]
    assert [record["id"] for record in source] == ["video1", "video0"]
    assert [record["image_id"] for record in source] == [0, 1]


def test_questions(root):
    rows = (
        {"video_id": "video0", "question": "who?", "answer": "a man", "answer_type": "who"},
        {"video_id": "video2", "question": "what?", "answer": "dog", "question_id": "q2"},
        {"video_id": "video0", "question": "where?", "answer": "home", "id": 31},
        {"video_id": 7, "question": "when?"},
    )
    source = load(root, rows)
    assert names(root, source) == ["video0.mp4", "video2", "7.mp4"]
    assert source[0]["questions"] == [
        {"question": "who?", "answers": {"a man": 1.0}},
        {"question": "where?", "answers": {"home": 1.0}, "question_id": 31},
    ]
    assert source[1]["questions"][0]["question_id"] == "q2"
    assert source[2]["questions"] == [{"question": "when?", "answers": {}}]
    assert source[0]["captions"] == []


def test_numbered_clips_are_found_by_their_files_names(root):
    (root.path / "videos" / "vid3.avi").write_bytes(b"a video")
    rows = [{"video_id": number, "question": "who?", "answer": "she"} for number in (0, 2)]
    assert names(root, load(root, rows)) == ["video0.mp4", "video2"]
    [record] = load(root, [{"video_id": 3, "question": "who?"}], extension=".avi")
    assert record["video"].endswith("videos/vid3.avi")
    (root.path / "videos" / "0.mp4").write_bytes(b"another")
    assert names(root, load(root, rows)) == ["0.mp4", "video2"]


def test_a_folder_of_frames_stands_for_a_file(root):
    [record] = load(root, [{"videoID": "video2", "enCap": ["a"]}])
    assert [int(frame[0, 0, 0]) for frame in load_clip(record["video"], 3)] == [0, 50, 100]


def test_frames_may_be_listed(root):
    frames = [f"video2/{number}.png" for number in (2, 0)]
    rows = (
        {"video": "first", "frames": frames, "caption": ["black after grey", "twice"]},
        {"video": "second", "frames": frames[:1], "caption": "grey"},
    )
    source = load(root, rows)
    assert [record["id"] for record in source] == ["first", "second"]
    assert [record["captions"] for record in source] == [["black after grey", "twice"], ["grey"]]
    listed = [f"{root.path}/videos/{frame}" for frame in frames]
    assert source[0]["video"] == listed and source[0]["image"] == listed[0]
    assert [frame[0, 0, 0] for frame in load_clip(source[0]["video"], 2)] == [100, 0]
    assert [frame[0, 0, 0] for frame in load_clip(source[1]["video"], 2)] == [100, 100]

    (own,) = load(root, ({"video": "v", "frames": frames, "captions": ["own"], "image_id": 9},))
    assert own["video"] == listed and own["image_id"] == 9 and "frames" not in own


def test_listed_frames_must_be_texts_inside_the_folder(root):
    good = {"video": "good", "frames": ["video2/0.png"], "caption": "black"}
    for frames, reason in (
        ([], "frames is empty"),
        ([3], "a frame is 3, not a text"),
        (["../../secret.png"], "lies outside the folder"),
    ):
        bad = {"video": "bad", "frames": frames, "caption": "nothing"}
        source = load(root, (good, bad), max_bad_fraction=0.9)
        assert len(source) == 1
        assert reason in source.bad_records[0][1]


def test_vatex(root):
    rows = [
        {"videoID": "video1", "enCap": ["a", "b", ""], "chCap": ["x"]},
        {"videoID": "clip", "enCap": ["c"]},
    ]
    source = load(root, rows, max_bad_fraction=0.5)
    assert [record["captions"] for record in source] == [["a", "b"], ["c"]]
    assert [reason for _, reason in source.bad_records] == ["caption 2 is empty"]
    assert names(root, load(root, rows[1:], extension=".webm")) == ["clip.webm"]


def test_own_rows_name_files_with_or_without_extension(root):
    rows = (
        {"video": "video0.mp4", "captions": ["a", "b"]},
        {"video": "clip.webm", "questions": [{"question": "who?", "answers": ["me", "you"]}]},
        {"video": "video2.mp4", "captions": ["frames"]},
        {"video": "video0.mp4", "questions": [{"question": "what?", "question_id": 4}]},
    )
    source = load(root, rows)
    assert names(root, source) == ["video0.mp4", "clip.webm", "video2"]
    assert source[0]["captions"] == ["a", "b"]
    assert source[0]["questions"] == [{"question": "what?", "answers": {}, "question_id": 4}]
    assert source[1]["questions"][0]["answers"] == {"me": 0.5, "you": 0.5}


def test_bad_rows_are_counted_by_themselves(root):
    bad = {
        "caption 0 is empty": {"clip_name": "video0", "caption": ""},
        "clip_name is missing": {"clip_name": None, "caption": "x"},
        "not of the file's format (MSRVTT retrieval)": {"caption": "x"},
        "outside the folder": {"clip_name": "../x", "caption": "x"},
    }
    good = [{"clip_name": "video0", "caption": f"{i}"} for i in range(4)]
    source = load(root, (*good[:2], *bad.values(), *good[2:]), max_bad_fraction=0.8)
    [record] = source
    assert record["captions"] == ["0", "1", "2", "3"]
    assert {where for where, _ in source.bad_records} == {
        f"{root.path}/data.jsonl:{line}" for line in (3, 4, 5, 6)
    }
    for expected in bad:
        assert any(expected in reason for _, reason in source.bad_records)


def test_own_rows_need_something(root):
    rows = ({"video": "video0", "captions": ["a"]}, {"video": "video1", "questions": []})
    source = load(root, rows, max_bad_fraction=0.5)
    assert source.bad_records == [(f"{root.path}/data.jsonl:2", "has no captions and no questions")]


def test_missing_clips_and_other_layouts(root):
    row = ({"clip_name": "video9", "caption": "x"},)
    with pytest.raises(SourceError, match=r"videos looked for .*video9\.mp4.*`videos` folder"):
        load(root, row)
    with pytest.raises(SourceError, match=r"no folder .*clips"):
        load(root, row, videos="clips")
    with pytest.raises(SourceError, match="none of MSRVTT retrieval, video QA, VATEX"):
        load(root, ({"clip": "video0", "caption": "x"},))
    with pytest.raises(SourceError, match="is one object with images, annotations"):
        load(root, {"images": [], "annotations": []})
    with pytest.raises(ValueError, match="no key 'images'"):
        load(root, row, images="videos")
