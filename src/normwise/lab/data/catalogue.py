"""Where each data set comes from, and how to tell that it came whole."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CATALOGUE", "Archive", "Source"]


@dataclass(frozen=True)
class Archive:
    """A file that the makers of a data set publish.

    Args:
        url: where; none where no official address is known to us.
        name: what the file is called.
        digest: ``md5:…`` or ``sha256:…`` as published; none where it is not known.
        unpack: whether it is a tar or zip archive to be unpacked, rather than kept as it is.
    """

    url: str | None
    name: str
    digest: str | None
    unpack: bool = False


@dataclass(frozen=True)
class Source:
    """A data set.

    Args:
        name: as ``normwise data fetch`` knows it.
        title: what it is.
        folder: where its files lie under ``NORMWISE_DATA``.
        archives: what to download.
        files: what must be in the folder in the end, relative to it.
        licence: as its makers state it.
        labelled: of a set to classify, its reader, ``MODULE:FUNCTION`` under
            ``normwise.lab.data``, a function of the data's root (default: none).
    """

    name: str
    title: str
    folder: str
    archives: tuple[Archive, ...]
    files: tuple[str, ...]
    licence: str
    labelled: str = ""


_TORONTO = "https://www.cs.toronto.edu/~kriz/"
_MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def _idx(base: str, digests: tuple[str, ...]) -> tuple[Archive, ...]:
    return tuple(
        Archive(f"{base}{name}.gz", f"{name}.gz", f"md5:{digest}")
        for name, digest in zip(_IDX, digests, strict=True)
    )


CATALOGUE: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "cifar10",
            "CIFAR-10, binary version",
            "cifar-10-batches-bin",
            (
                Archive(
                    f"{_TORONTO}cifar-10-binary.tar.gz",
                    "cifar-10-binary.tar.gz",
                    "md5:c32a1d4ab5d03f1284b67883e8d87530",
                    unpack=True,
                ),
            ),
            (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"),
            "none declared; cite Krizhevsky 2009",
            labelled="images:cifar10",
        ),
        Source(
            "cifar100",
            "CIFAR-100, binary version",
            "cifar-100-binary",
            (
                Archive(
                    f"{_TORONTO}cifar-100-binary.tar.gz",
                    "cifar-100-binary.tar.gz",
                    "md5:03b5dce01913d631647c71ecec9e9cb8",
                    unpack=True,
                ),
            ),
            ("train.bin", "test.bin"),
            "none declared; cite Krizhevsky 2009",
            labelled="images:cifar100",
        ),
        Source(
            "mnist",
            "MNIST",
            "mnist",
            _idx(
                _MNIST,
                (
                    "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                    "d53e105ee54ea40749a09fcbcd1e9432",
                    "9fb629c4189551a2d022fa330f9573f3",
                    "ec29112dd5afa0611ce80d1b7f02629c",
                ),
            ),
            tuple(f"{name}.gz" for name in _IDX),
            "commonly given as CC BY-SA 3.0",
            labelled="images:mnist",
        ),
        Source(
            "fashion-mnist",
            "Fashion-MNIST",
            "fashion-mnist",
            _idx(
                _FASHION,
                (
                    "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                    "25c81989df183df01b3e8a0aad5dffbe",
                    "bef4ecab320f06d8554ea6380940ec79",
                    "bb300cfdad3c16e7a12a480ee83cd310",
                ),
            ),
            tuple(f"{name}.gz" for name in _IDX),
            "MIT",
            labelled="images:fashion_mnist",
        ),
        Source(
            "tinyshakespeare",
            "Tiny Shakespeare",
            "tinyshakespeare",
            (
                Archive(
                    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                    "tinyshakespeare/input.txt",
                    "input.txt",
                    "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                ),
            ),
            ("input.txt",),
            "public domain",
        ),
        Source(
            "omniglot",
            "Omniglot",
            "omniglot",
            (
                Archive(None, "images_background.zip", None, unpack=True),
                Archive(None, "images_evaluation.zip", None, unpack=True),
            ),
            ("images_background", "images_evaluation"),
            "MIT; github.com/brendenlake/omniglot, folder python",
        ),
        Source(
            "fsdd",
            "Free Spoken Digit Dataset",
            "fsdd",
            (Archive(None, "recordings (a folder of WAV files)", None),),
            ("recordings",),
            "CC BY-SA 4.0; github.com/Jakobovski/free-spoken-digit-dataset",
            labelled="sounds:spoken_digits",
        ),
        Source(
            "speech-commands",
            "Speech Commands, version 2",
            "speech_commands",
            (Archive(None, "speech_commands_v0.02.tar.gz", None, unpack=True),),
            ("testing_list.txt", "validation_list.txt", "yes"),
            "CC BY 4.0; Warden 2018",
            labelled="sounds:speech_commands",
        ),
        Source(
            "esc10",
            "ESC-10 as log-mel spectra",
            "esc10",
            (Archive(None, "esc10_logmel.npz", None),),
            ("esc10_logmel.npz",),
            "CC BY 3.0; made from github.com/karoldvl/ESC-10",
            labelled="sounds:esc10",
        ),
        Source(
            "magnatagatune",
            "MagnaTagATune, music with tags",
            "magnatagatune",
            (Archive(None, "annotations_final.csv and the folders 0 to f of mp3.zip", None),),
            ("annotations_final.csv", *"0123456789abcdef"),
            "music CC BY-NC-SA 1.0, as on Magnatune; cite Law et al. 2009",
        ),
        Source(
            "bccd",
            "BCCD blood cells, Pascal VOC boxes",
            "BCCD",
            (Archive(None, "Annotations, JPEGImages and ImageSets/Main", None),),
            ("Annotations", "JPEGImages", "ImageSets/Main"),
            "MIT; github.com/Shenggan/BCCD_Dataset, folder BCCD",
        ),
        Source(
            "coco",
            "COCO 2017, images with boxes",
            "coco",
            tuple(
                Archive(None, f"{name}.zip", None, unpack=True)
                for name in ("annotations_trainval2017", "train2017", "val2017")
            ),
            (
                "annotations/instances_train2017.json",
                "annotations/instances_val2017.json",
                "train2017",
                "val2017",
            ),
            "annotations CC BY 4.0, images as on Flickr; cocodataset.org",
        ),
        Source(
            "cub",
            "CUB-200-2011, birds",
            "CUB_200_2011",
            (Archive(None, "images.txt, image_class_labels.txt and the folder images", None),),
            ("images.txt", "image_class_labels.txt", "images"),
            "non-commercial research and education; cite Wah et al. 2011",
        ),
        Source(
            "cars",
            "Cars-196",
            "cars",
            (Archive(None, "cars_annos.mat and the folder car_ims", None),),
            ("cars_annos.mat", "car_ims"),
            "none known; cite Krause et al. 2013",
        ),
        Source(
            "sop",
            "Stanford Online Products",
            "Stanford_Online_Products",
            (Archive(None, "Ebay_train.txt, Ebay_test.txt and the folders *_final", None),),
            ("Ebay_train.txt", "Ebay_test.txt"),
            "none known; cite Song et al. 2016",
        ),
        Source(
            "inshop",
            "In-shop Clothes Retrieval Benchmark",
            "inshop",
            (Archive(None, "Eval/list_eval_partition.txt and the folder Img/img", None),),
            ("Eval/list_eval_partition.txt", "Img/img"),
            "non-commercial research; cite Liu et al. 2016",
        ),
        Source(
            "brown",
            "Brown corpus, one sentence a line",
            "brown",
            (Archive(None, "brown.txt", None),),
            ("brown.txt",),
            "non-commercial use; github.com/nltk/nltk_data, packages/corpora/brown.zip",
        ),
        Source(
            "wikitext-2",
            "WikiText-2, word level",
            "wikitext-2",
            (Archive(None, "wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens", None),),
            ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
            "CC BY-SA 3.0; Merity et al. 2016",
        ),
        Source(
            "wikitext-103",
            "WikiText-103, word level",
            "wikitext-103",
            (Archive(None, "wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens", None),),
            ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
            "CC BY-SA 3.0; Merity et al. 2016",
        ),
    )
}
