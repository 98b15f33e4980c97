"""`few-shot`: a bundle and a few images of new classes in, a bundle of these classes out, in seconds."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.commands.bundles import add_bundle, add_card, card_of, golden_photos, strangers, tell, version_of
from training.commands.flags import DATA_HELP, add_cache, count
from training.names import name_of
from training.progress import say
from training.recipes import PIXEL_KNOBS, Recipe, make_recipe

if TYPE_CHECKING:
    from app.manifest import Bundle

SPLIT_KNOBS = ("test_fraction", "seed")


def add(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "few-shot",
        help="make a bundle for new classes from a bundle's features and a few images",
        description="Fit a new last layer to the features of another bundle: seconds on a CPU.",
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        "--from", dest="bundle", type=Path, required=True, help="bundle whose graph is kept up to its last layer"
    )
    parser.add_argument("--data", type=Path, required=True, help=DATA_HELP)
    parser.add_argument("--shots", type=count, metavar="N", help="training images per class; default: all there are")
    parser.add_argument(
        "--head",
        choices=("cosine", "logistic"),
        default="logistic",
        help="nearest class mean by cosine, or logistic regression (%(default)s)",
    )
    parser.add_argument("--name", help="name of the model; default: the data's")
    parser.add_argument("--source", help="where the data comes from, for the manifest")
    parser.add_argument(
        "--licence", default="not stated", help="terms of the data's use, for the manifest (%(default)s)"
    )
    add_card(parser)
    add_bundle(parser)
    add_cache(parser)
    for knob in SPLIT_KNOBS:
        field = Recipe.model_fields[knob]
        parser.add_argument(
            f"--{knob.replace('_', '-')}",
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=f"{field.description} [{field.default}]",
        )


def _run(options: argparse.Namespace) -> None:
    import tempfile
    import time

    import onnx
    import torch

    from training.data.arrays import load_split, read_listing
    from training.data.listing import Listing
    from training.export import Offer, export_graph
    from training.learning.devices import describe
    from training.transfer.fewshot import draw_shots, open_backbone
    from training.transfer.heads import HEADS
    from training.trust.fitted import Evidence

    name = name_of(options.data) if options.name is None else options.name
    version = version_of(options, name)
    golden_from = golden_photos(options)
    division = make_recipe(**{knob: getattr(options, knob) for knob in SPLIT_KNOBS if hasattr(options, knob)})
    backbone = open_backbone(options.bundle)
    parent = backbone.bundle.manifest
    found = read_listing(options.data)
    listing = found.split(division.test_fraction, division.seed)
    shots = draw_shots(listing, options.shots, division.seed)
    split = load_split(shots, parent.pixels, options.cache_dir)
    test_split = load_split(listing.part("test"), parent.pixels, options.cache_dir)
    words = f"a held-out {division.test_fraction:.0%}: {len(test_split.labels):,} of {len(found.train):,} images"
    begun = time.perf_counter()
    features = backbone.features(split)
    head = HEADS[options.head](features, split.labels, len(listing.classes))
    seconds = time.perf_counter() - begun
    say(
        f"Fitted a {options.head} head to {features.shape[1]:,} features of {len(shots):,} images of "
        f"{len(listing.classes)} classes in {seconds:.1f} s; testing on {len(test_split.labels):,}."
    )
    drawn = (division.test_fraction, division.seed) if found.test is None else None
    used = Listing(listing.classes, shots, listing.test)
    card = card_of(options, used, parent.pixels, options.data, drawn, source=options.source)
    offer = Offer(
        name=name,
        version=version,
        description=options.description or f"{parent.name} {parent.version} with a new head for {options.data.name}.",
        labels=listing.classes,
        pixels=parent.pixels,
        training={
            "recipe": _preprocessing(backbone.bundle) | division.model_dump(mode="json", include=set(SPLIT_KNOBS)),
            "backbone": {"name": parent.name, "version": parent.version, "sha256": parent.model.sha256},
            "weights": f"backbone of {parent.name} {parent.version}, and a head fitted to its features",
            **head.about,
            "shots": options.shots if options.shots is not None else "all",
            "images": len(shots),
            "seconds": round(seconds, 2),
            "hardware": describe(torch.device("cpu")),
            "data": str(options.data),
            "data_digest": listing.digest,
            "command": options.command_line,
        },
        data=f"{options.data}, {'its test part' if found.test is not None else words}",
        source=f"Head: {options.source or f'fitted to {options.data} by convoy-train'}. "
        f"Backbone: {parent.provenance.source}",
        licence=f"Head: {options.licence}. Backbone: {parent.provenance.licence}",
        command=options.command_line,
        data_card=card.encoded(),
    )
    evidence = Evidence(strangers=strangers(options, parent.pixels), calibrate=options.calibrate)
    target = options.models_dir / name / version
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model.onnx"
        onnx.save(backbone.graft(head, len(listing.classes)), model)
        exported = export_graph(model, backbone.answers(head), offer, test_split, target, golden_from, evidence)
    tell(exported, offer, "The graph and NumPy")


def _preprocessing(bundle: "Bundle") -> dict[str, Any]:
    """Return what the parent's manifest says of its network and of the pixels that it takes."""
    told = bundle.manifest.training.get("recipe")
    return {knob: told[knob] for knob in PIXEL_KNOBS if knob in told} if isinstance(told, dict) else {}
