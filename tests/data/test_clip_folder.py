"""Annotations and folders: what is read, what is reported, and what is refused."""

import json
import logging
import pickle
import unicodedata

import pytest

from gramjax.data import clips


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def annotate(tmp_path, *rows):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def stems(folder):
    return [
        tuple(None if file is None else file.rsplit("/", 1)[1] for file in (clip.video, clip.audio, clip.depth))
        for clip in folder.annotations
    ]


def test_rows_of_all_kinds(tmp_path):
    path = annotate(
        tmp_path,
        {"video_id": "a", "desc": "One.", "subtitle": "said", "audio_caption": "heard"},
        {"clip_id": "b", "video_id": "unused", "caption": ["One.", " ", "Two. "], "desc": ""},
        {"id": 7, "vast_cap": ["All of it."], "url": "x", "subtitle": None},
        {"image": "d", "label": "dog barking", "url": "y"},
        {"image_id": "e"},
    )
    folder = clips.ClipFolder(path)
    assert list(folder.annotations) == [
        clips.Clip("a", ("One.",), "said", "heard"),
        clips.Clip("b", ("One.", "Two.")),
        clips.Clip("7", ("All of it.",)),
        clips.Clip("d", ("dog barking",), label="dog barking"),
        clips.Clip("e"),
    ]
    assert len(folder) == 5
    assert folder[3].id == "d"
    assert clips.class_names(folder) == ("dog barking",)
    report = folder.report
    assert (report.rows, report.clips) == (5, 5)
    assert report.unknown_fields == {"url": 2}
    assert report.missing["caption"] == ["e"]
    assert report.missing["subtitle"] == ["b", "7", "d", "e"]
    assert report.missing["vision"] == ["a", "b", "7", "d", "e"]
    assert clips.ClipFolder(path, captions="first")[1].captions == ("One.",)


def test_rows_of_one_clip_are_put_together(tmp_path):
    path = annotate(
        tmp_path,
        {"id": "a", "desc": "One."},
        {"id": "b", "desc": "Other."},
        {"id": "a", "desc": ["Two.", "One."], "subtitle": "said"},
        {"id": "a", "desc": "Three.", "subtitle": "said again"},
    )
    folder = clips.ClipFolder(path)
    assert [clip.id for clip in folder.annotations] == ["a", "b"]
    assert folder[0].captions == ("One.", "Two.", "Three.")
    assert folder[0].subtitle == "said"
    assert folder.report.duplicates == ["a"]
    assert "1 merged" in folder.report.summary()


def test_files_are_found_by_id(tmp_path):
    ids = ("a", "GOD8_100.000_110.000", "GOD9_100.000_110.000", "video1", "d.mp4", "nothing")
    path = annotate(tmp_path, *({"id": clip_id} for clip_id in ids))
    folder = clips.ClipFolder(
        path,
        videos=touch(
            tmp_path / "v", "a.webm", "a.mp4", "GOD8_100.000_110.000.mkv", "GOD8_100.avi", "GOD9_100.MP4", "d.mp4"
        ),
        audios=touch(tmp_path / "s", "a.mp3", "a.wav", "a.txt", "GOD9_100.000_110.000.flac", "d.wav", "video10.mp3"),
        depths=touch(tmp_path / "d", "a.npy", "a_2.npy", "video10_depth.npy", "video1_depth.npy"),
    )
    assert stems(folder) == [
        ("a.mp4", "a.wav", "a.npy"),
        ("GOD8_100.000_110.000.mkv", None, None),
        ("GOD9_100.MP4", "GOD9_100.000_110.000.flac", None),
        (None, None, "video1_depth.npy"),
        ("d.mp4", "d.wav", None),
        (None, None, None),
    ]
    assert folder.report.missing["vision"] == ["video1", "nothing"]
    # The sound of a clip without a sound file is its video's.
    assert folder.report.missing["audio"] == ["video1", "nothing"]
    assert folder[1].file("audio") == folder[1].video
    assert folder[0].file("audio") == folder[0].audio
    assert pickle.loads(pickle.dumps(folder)).annotations == folder.annotations


@pytest.mark.parametrize(("of_rows", "of_files"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_accents_are_the_same_composed_or_not(tmp_path, of_rows, of_files):
    path = annotate(tmp_path, {"id": unicodedata.normalize(of_rows, "été.1")})
    name = unicodedata.normalize(of_files, "été")
    videos, depths = touch(tmp_path / "v", f"{name}.mp4"), touch(tmp_path / "d", f"{name}.1_depth.npy")
    assert stems(clips.ClipFolder(path, videos=videos, depths=depths)) == [(f"{name}.mp4", None, f"{name}.1_depth.npy")]
    assert clips.find_clips(videos, depths=touch(depths, f"{name}.npy"))[0].depth.endswith(f"{name}.npy")


def test_clips_without_annotations_are_the_files(tmp_path):
    media = touch(tmp_path / "m", "b.mp4", "b.wav", "a.mp3", "a.b.MKV", "b.txt", "c.npy")
    (media / "d.mp4").mkdir()
    found = clips.find_clips(media, depths=touch(tmp_path / "d", "b_depth.npy"))
    folder = clips.ClipFolder.of(found)
    # The sound of "a" is not that of "a.b".
    assert [clip.id for clip in folder.annotations] == ["a", "a.b", "b"]
    assert stems(folder) == [(None, "a.mp3", None), ("a.b.MKV", None, None), ("b.mp4", "b.wav", "b_depth.npy")]
    assert (folder.report.rows, folder.report.clips) == (3, 3)
    assert folder.report.missing["vision"] == ["a"]
    assert [clip.id for clip in folder.without(["a"]).annotations] == ["a.b", "b"]
    with pytest.raises(ValueError, match=r"media must be a folder of \.mp4, .* which holds none"):
        clips.find_clips(tmp_path / "d")
    with pytest.raises(ValueError, match=r"media must be a folder, got .*nowhere"):
        clips.find_clips(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no clip is left of 0 rows"):
        clips.ClipFolder.of([])


def test_incomplete_clips_are_dropped_on_request(tmp_path):
    path = annotate(tmp_path, {"id": "a"}, {"id": "b"}, {"id": "c"})
    options = {"videos": touch(tmp_path / "v", "a.mp4", "b.mp4"), "audios": touch(tmp_path / "s", "b.wav", "c.wav")}
    assert len(clips.ClipFolder(path, **options)) == 3
    folder = clips.ClipFolder(path, **options, require=("vision",))
    assert [clip.id for clip in folder.annotations] == ["a", "b"]
    assert folder.report.dropped == ["c"]
    assert folder.report.missing["vision"] == []
    rest = folder.without(["a"])
    assert [clip.id for clip in rest.annotations] == ["b"]
    assert rest.report.dropped == ["c", "a"]
    assert (len(folder), folder.report.dropped) == (2, ["c"])
    with pytest.raises(ValueError, match=r"ids must be .* got \['x'\]"):
        folder.without(["x"])
    with pytest.raises(ValueError, match="no clip is left of 3 rows: 3"):
        clips.ClipFolder(path, **options, require=("depth",))


def test_the_report_counts_and_names(tmp_path, caplog):
    path = annotate(tmp_path, {"id": "a", "desc": "One.", "url": "x"}, {"id": "b", "desc": "Two."})
    report = clips.ClipFolder(path, videos=touch(tmp_path / "v", "a.mp4")).report
    with caplog.at_level(logging.WARNING, logger="gramjax.data.clips"):
        for _ in range(3):
            report.add_unreadable("vision", "a", "a.mp4: broken")
    assert [record.getMessage() for record in caplog.records] == [
        "vision of clip a counts as absent, as of 1 of 2 clips so far: a.mp4: broken"
    ]
    assert report.summary() == (
        "2 clips of 2 rows; 1 without vision; 1 without audio; 2 without subtitle; 2 without depth; "
        "1 with unreadable vision; fields not used: url"
    )
    report.write(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["unreadable"] == {"vision": {"a": "a.mp4: broken"}}
    assert written["missing"]["vision"] == ["b"]
    assert clips.Report(**written) == report


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"name": "a"}], "row 0 of .* id under one of clip_id"),
        ([{"id": "a"}, {"id": ""}], "row 1 of .* got ''"),
        ([{"id": "../a"}], r"row 0 of .* got '\.\./a'"),
        ([{"id": ["a"]}], "row 0 of .* id must be a string"),
        ([{"id": "a", "desc": {"en": "One."}}], "row 0 of .* captions must be"),
        ([{"id": "a", "desc": [1]}], "row 0 of .* captions must be"),
        ([{"id": "a", "subtitle": True}], "row 0 of .* subtitle must be a string"),
        (["a"], "row 0 of .* must be an object"),
        ([], "at least one, got an empty list in"),
    ],
)
def test_rows_that_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        clips.ClipFolder(annotate(tmp_path, *rows))


def test_what_is_not_there_is_said_at_once(tmp_path, unchecked_signatures):
    path = annotate(tmp_path, {"id": "a"})
    with pytest.raises(ValueError, match=r"annotations must be .* does not exist"):
        clips.ClipFolder(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"videos must be a folder, got .*nothing"):
        clips.ClipFolder(path, videos=tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"audios must hold .* such as a\.wav; got .* holds b\.wav, say"):
        clips.ClipFolder(path, audios=touch(tmp_path / "s", "b.wav"))
    with pytest.raises(ValueError, match=r"videos must hold .* has no \.mp4, \.mkv"):
        clips.ClipFolder(path, videos=touch(tmp_path / "v", "a.txt"))
    (tmp_path / "text.json").write_text("no json")
    with pytest.raises(ValueError, match=r"annotations must be a JSON file, got .*text\.json"):
        clips.ClipFolder(tmp_path / "text.json")
    (tmp_path / "object.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="JSON list of rows, at least one, got dict"):
        clips.ClipFolder(tmp_path / "object.json")
    with pytest.raises(ValueError, match="captions must be 'all' or 'first', got 'last'"):
        clips.ClipFolder(path, captions="last")
    with pytest.raises(ValueError, match=r"require must be names out of .* got 'vision'"):
        clips.ClipFolder(path, require="vision")


def test_the_published_configs():
    found = {config.name: config for config in clips.PUBLISHED}
    assert list(found) == ["msrvtt", "didemo", "activitynet", "vatex", "audiocaps", "clotho", "vggsound", "vast"]
    assert {name for name, config in found.items() if config.transform == "crop_flip"} == {"msrvtt", "vast"}
    assert {name for name, config in found.items() if config.caption_length == 70} == {"didemo", "activitynet"}
    assert (found["vatex"].eval_frames, found["vast"].train_frames, found["clotho"].audio_slices) == (16, 2, 3)
    assert found["vast"].modalities == clips.MODALITIES
    for options in ({"modalities": ("smell",)}, {"modalities": ()}, {"eval_frames": 0}, {"caption_length": 1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            clips.ClipConfig(**{"name": "x", "modalities": ("vision",)} | options)
