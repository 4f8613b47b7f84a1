"""From a SOURCE of images to batches of images.

`sources.SOURCES` lists the kinds of SOURCE. `digits` always means the images in digits.npz (Alpaydin and Kaynak 1998,
UCI Machine Learning Repository, CC BY 4.0); a folder with that name is ./digits. A dataset on the hub is OWNER/NAME,
or OWNER/NAME:CONFIG for one of its configurations, and FOLDER:CONFIG is one of a folder. `layout` finds splits and
classes in the names of files. `ordering` says which images a step takes. `index`, `shared` and `remote` keep what is
slow to find out, decoded images, and parts of files at URLs.
"""

from ddpm.files.data.batches import STOP_SIGNALS, batches, send
from ddpm.files.data.decoding import Form, decoded
from ddpm.files.data.listing import EncodedImages, Options, image_files, is_hidden, is_image, natural
from ddpm.files.data.loading import (
    Images,
    describe,
    form_of,
    load,
    load_pair,
    paired,
    settings_of,
    settings_of_pairs,
    split_holdout,
    take,
)
from ddpm.files.data.objects import Given, given
from ddpm.files.data.ordering import Shards, order
from ddpm.files.data.sources import Arrays, Folder, Zip, folder_of

__all__ = [
    "STOP_SIGNALS",
    "Arrays",
    "EncodedImages",
    "Folder",
    "Form",
    "Given",
    "Images",
    "Options",
    "Shards",
    "Zip",
    "batches",
    "decoded",
    "describe",
    "folder_of",
    "form_of",
    "given",
    "image_files",
    "is_hidden",
    "is_image",
    "load",
    "load_pair",
    "natural",
    "order",
    "paired",
    "send",
    "settings_of",
    "settings_of_pairs",
    "split_holdout",
    "take",
]
