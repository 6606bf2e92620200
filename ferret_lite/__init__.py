"""Ferret, a multimodal LLM that refers and grounds, as a teaching and reference library.

Each name is loaded when it is first used, so that `import ferret_lite` loads neither PyTorch nor transformers."""
__version__ = "0.1.0"

from importlib import import_module

_ROOMS = {  # module -> the names that `ferret_lite` hands on, in reading order
    "coords": "quantize dequantize box_iou",
    "regions": "Point Box FreeForm region_mask region_coords",
    "points": "sample_points bilinear_features fps knn",
    "sampler": "RegionSampler build_sampler",
    "files": "open_image write_atomic",
    "captions": "",
    "plotting": "show_image show_regions show_answer contact_sheet",
    "records": "Record Dialogue Turn read_records write_records",
    "dialects": "",
    "grounding": "Phrase parse_answer phrase_boxes_px format_coords format_phrase",
    "templates": "Template",
    "prompt": "encode_dialogues encode_prompt",
    "processor": "FerretProcessor",
    "vision": "ConvStemVisionConfig ConvStemVisionModel",
    "splice": "",
    "config": "FerretConfig",
    "model": "FerretForConditionalGeneration load_model save_model",
    "build": "",
    "weights": "",
    "clip": "",
    "official": "",
    "conversion": "",
    "scenes": "Scene make_scene scene_mask",
    "textures": "",
    "tasks": "AnnotatedObject draw_dialogues",
    "annotated": "",
    "world": "",
    "relations": "",
    "talks": "",
    "world_tasks": "",
    "sources": "voc_records coco_records",
    "corpora": "",
    "genome": "",
    "released": "",
    "phrasings": "",
    "instructions": "",
    "neighbours": "",
    "negatives": "",
    "chats": "",
    "shards": "",
    "mix": "",
    "cards": "",
    "grit": "",
    "grit_commands": "",
    "grit_examples": "",
    "targets": "",
    "stages": "Stage",
    "examples": "",
    "recorded": "",
    "rows": "",
    "data": "FerretDataModule",
    "metrics": "rec_score referring_score existence_score description_score score_table",
    "predictions": "",
    "flickr": "",
    "world_scores": "",
    "captioning": "",
    "scorers": "score_files",
    "answering": "answer_questions",
    "questions": "score_questions",
    "evaluate": "",
    "bench": "",
    "world_bench": "",
    "optim": "Muon",
    "losses": "",
    "lora": "",
    "checkpoints": "",
    "training": "FerretModule",
    "shipped": "",
    "ask": "",
    "evaluate_cli": "",
    "cli": "",
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names.split()}
__all__ = [*_HOME]


def __getattr__(name):
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__():
    return sorted({*globals(), *_ROOMS, *_HOME})
