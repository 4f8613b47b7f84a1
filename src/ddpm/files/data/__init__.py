"""From a SOURCE to batches of images.

SOURCE is `digits` (the images that scikit-learn brings), a folder of images, a zip or parquet file, a local data set in
Hugging Face layout, or the name of a data set on the hub: OWNER/NAME or OWNER/NAME:CONFIG. A folder that is called
digits is ./digits.
"""

from ddpm.files.data.batches import batches, order, send
from ddpm.files.data.listing import natural, walk
from ddpm.files.data.loading import Images, load, load_pair, split_holdout

__all__ = ["Images", "batches", "load", "load_pair", "natural", "order", "send", "split_holdout", "walk"]
