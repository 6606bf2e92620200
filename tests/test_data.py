"""Batches are a function of seed, step and slot; no single image ends a run; what a config gets wrong is said early."""
import hashlib
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from ferret_lite.data import FerretDataModule
from ferret_lite.examples import FolderExamples, SceneExamples, make_questions
from ferret_lite.rows import TrainingDataset, tiny_processor
from ferret_lite.sources import Annotated
from ferret_lite.stages import Stage, StageBatches, stage_at
from ferret_lite.targets import dense_targets, patch_labels, zoom_and_flip
from ferret_lite.tasks import AnnotatedObject, dataset_texts

OBJECT = ("<object><name>{0}</name><difficult>{2}</difficult><bndbox><xmin>{1[0]}</xmin><ymin>{1[1]}</ymin>"
          "<xmax>{1[2]}</xmax><ymax>{1[3]}</ymax></bndbox></object>")
STAGES = [Stage(2, 3, loss="dense"), Stage(4, 2)]


def module(stages=STAGES, **settings):
    small = dict(num_workers=0, num_scenes=5, num_points=16, max_length=128)
    return FerretDataModule(stages, **{**small, **settings})


@pytest.fixture(scope="module")
def data():
    return module()


def dataset_of(data, examples=None, **changes):
    settings = dict(mix=data.mix, forms=data.forms, augment=data.augment, seed=data.seed, max_length=data.max_length)
    return TrainingDataset(data.train_examples if examples is None else examples, data.processor, data.stages,
                           data.words, data.grid, **{**settings, **changes})


def digest(batch):
    """One number for all tensors of a batch."""
    joined = b"".join(name.encode() + batch[name].numpy().tobytes() for name in sorted(batch))
    return hashlib.sha256(joined).hexdigest()


def picture(path, size, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16": image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode != "RGB": image = image.convert(mode)
    image.save(path, format="TIFF" if mode == "CMYK" else "PNG")


@pytest.fixture
def voc(tmp_path):
    """Write a VOC folder from {image: [(name, box, difficult), ...]}; every split is the same."""
    def write(size=(40, 30), **images):
        for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (tmp_path/folder).mkdir(parents=True, exist_ok=True)
        for name, objects in images.items():
            picture(tmp_path/f"JPEGImages/{name}.jpg", size)
            said = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
            body = said + "".join(OBJECT.format(*o, 0) for o in objects)
            (tmp_path/f"Annotations/{name}.xml").write_text(f"<annotation>{body}</annotation>", encoding="utf-8")
        for split in ("train", "val", "test"):
            (tmp_path/f"ImageSets/Main/{split}.txt").write_text("\n".join(images))
        return tmp_path
    return write


DOG, CAT = ("dog", (3, 4, 20, 25)), ("traffic light", (22, 2, 38, 28))


# What is drawn -------------------------------------------------------------------------------------------------------

def test_any_step_can_be_made_again_and_a_later_start_gives_the_same_keys():
    stages = [Stage(3, 4), Stage(5, 3)]
    keys = list(StageBatches(stages, 7, seed=1))
    assert [len(k) for k in keys] == [4] * 3 + [3] * 5
    assert [{step for step, _, _ in k} for k in keys] == [{i} for i in range(8)]
    for start in (0, 2, 3, 7, 8):
        assert list(StageBatches(stages, 7, seed=1, start_step=start)) == keys[start:]
    assert [stage_at(stages, step) for step in (0, 2, 3, 7, 99)] == [(0, 0), (0, 2), (1, 0), (1, 4), (1, 4)]


def test_each_epoch_shows_every_image_once_in_an_order_of_its_own_and_goes_on_over_stages():
    seen = [example for keys in StageBatches([Stage(3, 4), Stage(5, 6)], 7, seed=1) for _, _, example in keys]
    epochs = [seen[i:i + 7] for i in range(0, len(seen), 7)]
    assert len(epochs) == 6 and all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6
    assert seen != [example for keys in StageBatches([Stage(3, 4), Stage(5, 6)], 7, seed=2) for _, _, example in keys]


def test_batches_do_not_depend_on_workers_on_partners_or_on_what_was_made_before(data):
    made = [digest(batch) for batch in data.train_dataloader()]
    dataset = dataset_of(data)
    again = [digest(dataset.collate([dataset[key] for key in keys])) for keys in list(StageBatches(STAGES, 5))[::-1]]
    assert len(set(made)) == 6 and again[::-1] == made
    alone, together = (dataset.collate([dataset[k] for k in keys]) for keys in ([(3, 1, 0)], [(3, 0, 4), (3, 1, 0)]))
    assert torch.equal(together["input_ids"][1:], alone["input_ids"])
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=StageBatches(STAGES, 5), collate_fn=dataset.collate,
                                         num_workers=2)
    assert [digest(batch) for batch in loader] == made


def test_another_seed_gives_other_batches(data):
    batches = [next(iter(module(seed=seed, stages=[Stage(1, 2)]).train_dataloader())) for seed in (0, 1)]
    assert all(not torch.equal(batches[0][name], batches[1][name]) for name in ("pixel_values", "input_ids"))


class Recorder(L.LightningModule):
    """A model that only writes down what it is shown."""
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.global_step, digest(batch)))
        return self.weight.sum()

    def transfer_batch_to_device(self, batch, device, dataloader_idx): return batch
    def validation_step(self, batch, batch_idx): pass
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.1)


def run(folder, data, max_steps, ckpt_path=None, **settings):
    trainer = L.Trainer(default_root_dir=folder, max_steps=max_steps, max_epochs=-1, logger=False, accelerator="cpu",
                        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
                        num_sanity_val_steps=0, check_val_every_n_epoch=None, **settings,
                        callbacks=[ModelCheckpoint(folder, every_n_train_steps=1, save_last=True, save_top_k=-1)])
    recorder = Recorder()
    trainer.fit(recorder, datamodule=data, ckpt_path=ckpt_path)
    return recorder.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop, accumulate", [(1, 1), (4, 1), (3, 2)])
def test_a_resumed_run_sees_what_an_unbroken_one_sees(data, tmp_path, stop, accumulate):
    """Steps are the optimiser's: with accumulated batches the loader lasts as much longer."""
    data = module([Stage(2, 2, loss="dense"), Stage(5, 2)], val_questions=1)
    settings = dict(val_check_interval=2 * accumulate, accumulate_grad_batches=accumulate)
    unbroken = run(tmp_path/"a", data, 7, **settings)
    assert [step for step, _ in unbroken] == [step for step in range(7) for _ in range(accumulate)]
    assert len({seen for _, seen in unbroken}) == 7 * accumulate
    first = run(tmp_path/"b", data, stop, **settings)
    rest = run(tmp_path/"b", data, 7, ckpt_path=str(tmp_path/"b/last.ckpt"), **settings)
    assert first + rest == unbroken


def test_a_step_is_dealt_out_to_devices_and_to_accumulated_batches():
    """Whoever runs it, a step has the same images; no two batches share one."""
    alone = list(StageBatches([Stage(3, 12)], 50, start_step=1))
    place = dict(start_step=1, accumulate=2, devices=3)
    parts = [list(StageBatches([Stage(3, 2)], 50, rank=rank, **place)) for rank in range(3)]
    for step, whole in enumerate(alone):
        keys = [key for part in parts for batch in part[2 * step:2 * step + 2] for key in batch]
        assert sorted(keys) == sorted(whole) and len(set(keys)) == 12
    assert len(StageBatches([Stage(3, 2)], 50, start_step=1, accumulate=2, rank=1, devices=3)) == 6


def test_the_full_world_brings_its_own_tasks_and_its_own_way_to_ask():
    data = module([Stage(1, 2, loss="dense"), Stage(1, 2)], format="world", image_size=96, max_length=512)
    dense, batch = data.train_dataloader()
    assert batch["pixel_values"].shape == (2, 3, 96, 96) and batch["input_ids"].shape == (2, 512)
    assert dense["dense_words"].shape[1:] == (144, len(data.words)) and "diamond" in data.words
    asked = data.questions("val", 1)
    assert {"relate", "count", "which", "same", "locate"} < {q.task for q in asked}
    assert asked[0].dialogue.turns[1].text == data.questions("val", 1)[0].dialogue.turns[1].text
    with pytest.raises(ValueError, match="would turn left into right"): module(format="world", augment="mirror")
    with pytest.raises(ValueError, match="'count'"): module(format="world", mix={"counting": 1})


def test_train_val_and_test_share_no_scene():
    marks = [hashlib.sha256(SceneExamples(split)[i].image.tobytes()).digest()
             for split in ("train", "val", "test") for i in range(60)]
    assert len(set(marks)) == 180


def test_scenes_are_a_sequence():
    for split in ("train", "val", "test"):
        examples = SceneExamples(split, num=3)
        assert [e.id for e in examples] == [f"scene-0-{split}-{i}" for i in range(3)]
    with pytest.raises(IndexError): examples[3]


# What a batch holds --------------------------------------------------------------------------------------------------

def test_shapes_and_what_each_stage_needs(data):
    dense, *_, answers = data.train_dataloader()
    assert {name: tuple(x.shape) for name, x in dense.items()} == {
        "pixel_values": (3, 3, 64, 64),
        "dense_words": (3, 64, 14), "dense_boxes": (3, 64, 4), "dense_places": (3, 64, 4)}
    assert {"input_ids", "labels", "position_ids", "dialogue_ids", "region_points", "region_mask"} < answers.keys()
    assert tuple(answers["input_ids"].shape) == (2, 128)
    regions = (answers["input_ids"] == data.processor.region_token_id).sum(1)
    torch.testing.assert_close(regions, answers["region_mask"].sum(1))


def test_dense_targets_say_what_the_patch_shows_and_nothing_for_background(data):
    example = data.train_examples[0]
    labels, targets = patch_labels(example, 8).ravel(), dense_targets(example, data.words, 8)
    for patch, label in enumerate(labels):
        name = example.objects[label].name.split() if label >= 0 else []
        assert [w for w, on in zip(data.words, targets["words"][patch]) if on] == [w for w in data.words if w in name]
        box = np.array(example.objects[label].box) / 64 if label >= 0 else np.zeros(4)
        np.testing.assert_allclose(targets["boxes"][patch].numpy(), box, rtol=1e-6)
        assert targets["places"][patch].tolist() == np.floor(box * 100).clip(max=99).tolist()


def test_an_image_without_objects_has_background_alone():
    empty = Annotated(np.zeros((20, 30, 3), np.uint8), 30, 20, [], "empty")
    assert (patch_labels(empty, 4) == -1).all()
    targets = dense_targets(empty, ["red", "disc"], 4)
    assert {name: (tuple(x.shape), x.sum().item()) for name, x in targets.items()} == {
        "words": ((16, 2), 0), "boxes": ((16, 4), 0), "places": ((16, 4), 0)}


def test_small_objects_lie_over_large_ones_where_there_are_no_masks():
    objects = [AnnotatedObject("ball", (10, 10, 20, 20)), AnnotatedObject("dog", (0, 0, 40, 40))]
    labels = patch_labels(Annotated(None, 40, 40, objects, "x"), 4)
    assert labels[1, 1] == 0 and (labels == 1).sum() == 15


def test_crops_keep_boxes_and_masks_on_their_objects():
    for i in range(20):
        example = SceneExamples()[i]
        cropped = zoom_and_flip(example, np.random.default_rng(i))
        assert cropped.image.shape[:2] == (cropped.height, cropped.width)
        for o in cropped.objects:
            y, x = np.nonzero(o.mask)
            x1, y1, x2, y2 = o.box
            assert x1 <= x.min() and y1 <= y.min() and x.max() < x2 and y.max() < y2
            color = np.median(cropped.image[o.mask], axis=0)
            true = next(t for t in example.objects if t.name == o.name)
            assert np.abs(color - np.median(example.image[true.mask], axis=0)).max() < 12


# Folders -------------------------------------------------------------------------------------------------------------

def test_names_of_several_words_and_words_that_classes_share(voc):
    others = [("light", (1, 1, 9, 9)), ("L", (12, 1, 19, 9)), ("chien andalou été", (20, 2, 30, 20))]
    root = voc(a=[DOG, CAT], b=others)
    data = module(format="voc", root=root)
    assert data.words == ["L", "chien", "andalou", "été", "dog", "light", "traffic"]
    batch = list(data.train_dataloader())[-1]
    shown = {tuple(np.array(data.words)[row > 0]) for row in batch["dense_words"].numpy().reshape(-1, 7)}
    assert shown == {(), ("L",), ("light",), ("light", "traffic"), ("dog",), ("chien", "andalou", "été")}
    ids = data.processor.tokenizer("Where is the L? A chien andalou été.").input_ids
    assert "<0x" not in "".join(data.processor.tokenizer.convert_ids_to_tokens(ids))


def test_a_folder_leaves_out_what_cannot_be_used_and_says_so(voc):
    root = voc(good=[DOG], difficult=[(*DOG, 1)], nothing=[], broken=[DOG], turned=[DOG])
    (root/"JPEGImages/broken.jpg").write_bytes(b"no image")
    picture(root/"JPEGImages/turned.jpg", (30, 40))
    with pytest.warns(UserWarning, match="4 left out"): examples = FolderExamples(root)
    assert [e.id for e in examples] == ["good"] and examples.names == ["dog"]
    for name, problem in [("difficult", "no object to ask about"), ("nothing", "no object to ask about"), ("broken",
                          "no readable image"), ("turned", "is 30 x 40 as shown, its annotation says 40 x 30")]:
        assert any(name in line and problem in line for line in examples.skipped)


def test_a_folder_with_nothing_usable_is_one_error(voc):
    with pytest.raises(ValueError, match="no image with a usable object.*no object to ask about"):
        FolderExamples(voc(a=[], b=[(*DOG, 1)]))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_images_of_any_mode(voc, mode):
    root = voc(a=[DOG, CAT])
    picture(root/"JPEGImages/a.jpg", (40, 30), mode)
    batch = next(iter(module([Stage(1, 2)], format="voc", root=root, augment="mirror").train_dataloader()))
    assert tuple(batch["pixel_values"].shape) == (2, 3, 64, 64) and batch["pixel_values"].isfinite().all()


@pytest.mark.parametrize("size", [(1, 1), (2, 150), (300, 3)])
def test_images_of_any_size(voc, size):
    root = voc(size, a=[("dog", (0, 0, *size)), ("cat", (0, 0, 1, 1))])
    data = module([Stage(3, 2)], format="voc", root=root, augment="mirror")
    for batch in data.train_dataloader():
        points = batch["region_points"][batch["region_mask"]]
        assert ((points >= 0) & (points <= 1)).all()


# One record cannot end a run -----------------------------------------------------------------------------------------

def many(num, name="dog"):
    return [AnnotatedObject(name, (i, i, i + 9, i + 9)) for i in range(num)]


class Listed(list):
    names = ["dog", "cat", "cow"]


def image_of(objects, name):
    return Annotated(np.full((60, 60, 3), 99, np.uint8), 60, 60, objects, name)


def test_what_is_too_long_is_dropped_and_other_dialogues_are_drawn(data):
    examples = Listed([image_of(many(30), "crowd")])
    batches = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mix in ({"describe": 0.8, "exists": 0.2}, {"describe": 0.5, "refer": 0.5}):
            dataset = dataset_of(data, examples, mix=mix)
            batches += [dataset.collate([dataset[(2 + i, 0, 0)] for i in range(6)]) for _ in range(2)]
    assert all((batch["labels"] >= 0).any(1).all() for batch in batches)
    assert digest(batches[0]) == digest(batches[1]) and digest(batches[2]) == digest(batches[3])


def test_an_image_without_any_possible_question_is_named_and_replaced(data):
    examples = Listed([image_of(many(30), "crowd"), image_of(many(1), "single")])
    for mix, problem in (({"describe": 1.0}, "need 693 tokens"), ({"locate": 1.0}, "no dialogue")):
        dataset = dataset_of(data, examples, mix=mix)
        with pytest.warns(UserWarning, match=f"another image takes its place: crowd: .*{problem}"):
            batch = dataset.collate([dataset[(2, 0, 0)]])
        assert (batch["labels"] >= 0).any()


def test_a_file_that_breaks_off_is_replaced(voc):
    root = voc((200, 200), a=[DOG, CAT], b=[DOG, CAT])
    path = root/"JPEGImages/a.jpg"
    Image.open(path).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:2000])  # its header is sound
    data = module([Stage(1, 2)], format="voc", root=root)
    with pytest.warns(UserWarning, match=r"takes its place: a: .*a.jpg"): batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])


def test_a_run_in_which_nothing_works_ends_with_the_reason(data):
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="20 images in a.*max_length=66"):
        dataset_of(data, max_length=66)[(2, 0, 0)]


def test_a_crop_without_a_question_is_not_used(data):
    ignored = AnnotatedObject("cat", (0, 57, 3, 60), ignore=True)
    corner = image_of([AnnotatedObject("dog", (0, 0, 3, 3)), ignored], "corner")
    dataset, sizes = dataset_of(data, Listed([corner]), augment="mirror", mix={"locate": 1.0}), set()
    for step in range(2, 6):
        cropped = zoom_and_flip(corner, np.random.default_rng([0, step, 0]))
        image, (encoded, points), dense = dataset[(step, 0, 0)]
        left = any(not o.ignore for o in cropped.objects)
        assert image.size == ((cropped.width, cropped.height) if left else (60, 60))
        sizes.add(image.size)
    assert (60, 60) in sizes


def test_decoded_files_stay_in_memory_while_there_is_room(voc, data):
    examples = FolderExamples(voc(a=[DOG], b=[DOG]))
    dataset = dataset_of(data, examples)
    dataset.with_pixels.room = 40 * 30 * 3
    pixels = [dataset.with_pixels(examples[i]).image for i in (0, 0, 1, 1)]
    assert pixels[0] is pixels[1] and pixels[2] is not pixels[3]
    np.testing.assert_array_equal(pixels[2], pixels[3])


# Held-out questions --------------------------------------------------------------------------------------------------

def test_questions_are_the_same_every_time_and_their_keys_differ(data):
    first, again = (data.questions("val", 3) for _ in range(2))
    assert [(q.key, q.dialogue.turns) for q in first] == [(q.key, q.dialogue.turns) for q in again]
    assert len({q.key for q in first}) == len(first) == 15
    assert {q.key for q in first}.isdisjoint(q.key for q in data.questions("test", 3))
    few = make_questions(data.examples("val"), "locate", num=2)
    assert [q.key for q in few] == [q.key for q in make_questions(data.examples("val"), "locate", num=3)][:2]


def test_all_questions_of_a_folder(voc):
    examples = FolderExamples(voc(a=[DOG, CAT], b=[DOG, ("dog", (1, 1, 9, 9))]))
    assert [q.key for q in make_questions(examples, "locate")] == ["a/locate/0", "a/locate/1"]
    asked = make_questions(examples, "refer_box", form="coordinates")
    assert [q.key for q in asked] == [f"{i}/refer_box:coordinates/{j}" for i in "ab" for j in range(2)]
    assert isinstance(asked[0].example.image, str)  # a thousand questions must not hold a thousand photographs


# The data module -----------------------------------------------------------------------------------------------------

def test_a_trained_ferrets_processor_can_be_taken_along(data, voc, tmp_path):
    data.processor.save_pretrained(tmp_path/"model")
    again = module(processor=str(tmp_path/"model"), image_size=32, patch_size=16, num_points=5)
    assert again.grid == 8 and again.processor.num_points == 16
    assert [digest(b) for b in again.train_dataloader()] == [digest(b) for b in data.train_dataloader()]
    folder = module(processor=str(tmp_path/"model"), format="voc", root=voc(a=[DOG, CAT]))
    assert folder.words == ["dog", "traffic", "light"]
    batch = list(folder.train_dataloader())[-1]
    text = folder.processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] >= 0])
    assert "dog" in text or "traffic light" in text  # new words, spelled in bytes


@pytest.mark.parametrize("settings, message", [
    (dict(mix={"locat": 1.0}), "mix .*'locat'.*'refer'"),
    (dict(mix={"locate": 0.0}), "not all 0"),
    (dict(forms={"coords": 0.5, "": 0.5}), "forms .*'coords'.*'coordinates'"),
    (dict(forms={"": 1.5, "feature": -0.5}), "0 or more"),
    (dict(splits=["train", "val"]), "name three"),
    (dict(format="voc"), "--data.root"),
    (dict(format="yolo", root="."), "unknown format 'yolo'"),
    (dict(processor="no/such/folder"), "no/such/folder"),
])
def test_a_wrong_setting_is_said_before_training(settings, message):
    with pytest.raises((ValueError, OSError), match=message): module(**settings)


def test_a_stage_has_steps_and_images():
    for wrong in (dict(steps=0), dict(steps=5, batch_size=0)):
        with pytest.raises(ValueError, match="at least 1"): Stage(**wrong)


def test_a_tokenizer_has_room_for_hundreds_of_classes():
    names = ["".join("aeiou"[n // 7**k % 5] + "bdfgklm"[n // 7**k % 7] for k in range(4)) for n in range(7**4)][::9]
    processor = tiny_processor(list(dataset_texts(names)), 64, 64, 16, 1.0)
    assert len(processor.tokenizer.tokenize(f"a {names[-1]}")) == 2 < 1024 < len(processor.tokenizer)


def test_shares_need_not_sum_to_one():
    assert module(forms={"": 3, "feature": 1}).forms == {"": 0.75, "feature": 0.25}
