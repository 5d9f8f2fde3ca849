"""The small data sets, by their name in the tests."""

from benchmarks.small_data import FAMILIES, pictures, write_cifar100, write_image_folder, write_inat

__all__ = ["FAMILIES", "pictures", "write_cifar100", "write_image_folder", "write_inat"]
