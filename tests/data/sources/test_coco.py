"""COCO's caption files and NoCaps."""

from mplug_jax.data.sources import build_source


def load(root, document, **spec):
    root.write("data.json", document)
    spec = {"kind": "captions", "path": "data.json", "images": "images", **spec}
    return build_source(spec, root.path)


def test_coco_captions_file(data_root):
    source = load(
        data_root,
        {
            "info": {},
            "images": [{"id": 9, "file_name": "a.jpg"}, {"id": 4, "file_name": "b.jpg"}],
            "annotations": [
                {"id": 1, "image_id": 4, "caption": "of b"},
                {"id": 2, "image_id": 9, "caption": "of a"},
                {"id": 3, "image_id": 4, "caption": "of b too"},
            ],
        },
    )
    names = [row["image"].removeprefix(f"{data_root.path}/images/") for row in source]
    assert names == ["a.jpg", "b.jpg"]
    assert [row["captions"] for row in source] == [["of a"], ["of b", "of b too"]]
    assert [row["image_id"] for row in source] == [9, 4]


def test_nocaps_keeps_the_domains(data_root):
    document = {
        "images": [
            {"id": 0, "file_name": "a.jpg", "coco_url": "https://x/a.jpg", "domain": "in-domain"},
            {"id": 1, "file_name": "b.jpg", "coco_url": "https://x/b.jpg", "domain": "out-domain"},
        ],
        "annotations": [
            {"id": 0, "image_id": 1, "caption": "a zebra"},
            {"id": 1, "image_id": 0, "caption": "a dog"},
            {"id": 2, "image_id": 1, "caption": "stripes"},
        ],
    }
    source = load(data_root, document)
    assert [row["domain"] for row in source] == ["in-domain", "out-domain"]
    assert [row["captions"] for row in source] == [["a dog"], ["a zebra", "stripes"]]
    assert [row["image_id"] for row in source] == [0, 1]


def test_coco_ids_that_cannot_be_ids_are_bad_items(data_root):
    document = {
        "images": [{"id": [1], "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [{"image_id": [1], "caption": "x"}, {"image_id": 2, "caption": "y"}],
    }
    source = load(data_root, document, max_bad_fraction=0.9)
    assert [row["captions"] for row in source] == [["y"]]
    assert len(source.bad_records) == 2


def test_coco_captions_with_lost_parts(data_root):
    document = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"file_name": "b.jpg"}],
        "annotations": [{"image_id": 1, "caption": "good"}, {"image_id": 7, "caption": "lost"}],
    }
    source = load(data_root, document, max_bad_fraction=0.9)
    assert len(source) == 1
    assert [where.split(": ")[1] for where, _ in source.bad_records] == [
        "images[1]",
        "annotations[1]",
    ]
