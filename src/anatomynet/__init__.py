"""AnatomyNet: whole-volume segmentation of head-and-neck CT (Zhu et al., Medical Physics 2018)."""

__version__ = "0.1.0"
