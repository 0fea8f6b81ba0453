"""The papers whose methods we train with, to cite them."""

from __future__ import annotations

import dataclasses

from freeadv_fast.config.method_names import Method


@dataclasses.dataclass(frozen=True)
class Paper:
    """A paper.

    Attributes:
        key: Of its BibTeX entry. short: As texts name it. title: As printed.
        authors: In order, separated by commas.
        venue: Where it appeared. year: When.
        arxiv: Its number there.
    """

    key: str
    short: str
    title: str
    authors: str
    venue: str
    year: int
    arxiv: str

    @property
    def url(self) -> str:
        """Where it can be read."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def bibtex(self) -> str:
        """Its entry."""
        fields = {
            "title": self.title,
            "author": self.authors.replace(", ", " and "),
            "booktitle": self.venue,
            "year": str(self.year),
            "url": self.url,
        }
        lines = [f"  {name}={{{text}}}," for name, text in fields.items()]
        return "\n".join([f"@inproceedings{{{self.key},", *lines, "}"])


_FREE = Paper(
    "shafahi2019free",
    "Shafahi et al. 2019",
    "Adversarial Training for Free!",
    "Ali Shafahi, Mahyar Najibi, Amin Ghiasi, Zheng Xu, John Dickerson, Christoph Studer, "
    "Larry S. Davis, Gavin Taylor, Tom Goldstein",
    "Advances in Neural Information Processing Systems",
    2019,
    "1904.12843",
)
_TRADES = Paper(
    "zhang2019theoretically",
    "Zhang et al. 2019",
    "Theoretically Principled Trade-off between Robustness and Accuracy",
    "Hongyang Zhang, Yaodong Yu, Jiantao Jiao, Eric P. Xing, Laurent El Ghaoui, Michael I. Jordan",
    "International Conference on Machine Learning",
    2019,
    "1901.08573",
)
RETINANET = Paper(
    "lin2017focal",
    "Lin et al. 2017",
    "Focal Loss for Dense Object Detection",
    "Tsung-Yi Lin, Priya Goyal, Ross Girshick, Kaiming He, Piotr Doll{\\'a}r",
    "IEEE International Conference on Computer Vision",
    2017,
    "1708.02002",
)
COCO = Paper(
    "lin2014microsoft",
    "Lin et al. 2014",
    "Microsoft COCO: Common Objects in Context",
    "Tsung-Yi Lin, Michael Maire, Serge Belongie, Lubomir Bourdev, Ross Girshick, James Hays, "
    "Pietro Perona, Deva Ramanan, C. Lawrence Zitnick, Piotr Doll{\\'a}r",
    "European Conference on Computer Vision",
    2014,
    "1405.0312",
)
COCO_C = Paper(
    "michaelis2019benchmarking",
    "Michaelis et al. 2019",
    "Benchmarking Robustness in Object Detection: Autonomous Driving when Winter is Coming",
    "Claudio Michaelis, Benjamin Mitzkus, Robert Geirhos, Evgenia Rusak, Oliver Bringmann, "
    "Alexander S. Ecker, Matthias Bethge, Wieland Brendel",
    "arXiv preprint arXiv:1907.07484",
    2019,
    "1907.07484",
)

# None of natural training; two of the one that is ours.
PAPERS: dict[Method, tuple[Paper, ...]] = {
    "natural": (),
    "free": (_FREE,),
    "trades": (_TRADES,),
    "free-trades": (_FREE, _TRADES),
    "fgsm": (
        Paper(
            "goodfellow2015explaining",
            "Goodfellow et al. 2015",
            "Explaining and Harnessing Adversarial Examples",
            "Ian J. Goodfellow, Jonathon Shlens, Christian Szegedy",
            "International Conference on Learning Representations",
            2015,
            "1412.6572",
        ),
    ),
    "fgsm-rs": (
        Paper(
            "wong2020fast",
            "Wong et al. 2020",
            "Fast is better than free: Revisiting adversarial training",
            "Eric Wong, Leslie Rice, J. Zico Kolter",
            "International Conference on Learning Representations",
            2020,
            "2001.03994",
        ),
    ),
    "n-fgsm": (
        Paper(
            "dejorge2022make",
            "de Jorge et al. 2022",
            "Make Some Noise: Reliable and Efficient Single-Step Adversarial Training",
            "Pau de Jorge, Adel Bibi, Riccardo Volpi, Amartya Sanyal, Philip H. S. Torr, "
            "Gregory Rogez, Puneet K. Dokania",
            "Advances in Neural Information Processing Systems",
            2022,
            "2202.01181",
        ),
    ),
    "gradalign": (
        Paper(
            "andriushchenko2020understanding",
            "Andriushchenko and Flammarion 2020",
            "Understanding and Improving Fast Adversarial Training",
            "Maksym Andriushchenko, Nicolas Flammarion",
            "Advances in Neural Information Processing Systems",
            2020,
            "2007.02617",
        ),
    ),
    "elle": (
        Paper(
            "abadrocamora2024efficient",
            "Abad Rocamora et al. 2024",
            "Efficient local linearity regularization to overcome catastrophic overfitting",
            "Elias Abad Rocamora, Fanghui Liu, Grigorios G. Chrysos, Pablo M. Olmos, Volkan Cevher",
            "International Conference on Learning Representations",
            2024,
            "2401.11618",
        ),
    ),
    "pgd": (
        Paper(
            "madry2018towards",
            "Madry et al. 2018",
            "Towards Deep Learning Models Resistant to Adversarial Attacks",
            "Aleksander Madry, Aleksandar Makelov, Ludwig Schmidt, Dimitris Tsipras, Adrian Vladu",
            "International Conference on Learning Representations",
            2018,
            "1706.06083",
        ),
    ),
    "yopo": (
        Paper(
            "zhang2019you",
            "Zhang et al. 2019",
            "You Only Propagate Once: Accelerating Adversarial Training via Maximal Principle",
            "Dinghuai Zhang, Tianyuan Zhang, Yiping Lu, Zhanxing Zhu, Bin Dong",
            "Advances in Neural Information Processing Systems",
            2019,
            "1905.00877",
        ),
    ),
    "dat": (
        Paper(
            "zhang2022distributed",
            "Zhang et al. 2022",
            "Distributed Adversarial Training to Robustify Deep Neural Networks at Scale",
            "Gaoyuan Zhang, Songtao Lu, Yihua Zhang, Xiangyi Chen, Pin-Yu Chen, Quanfu Fan, "
            "Lee Martie, Lior Horesh, Mingyi Hong, Sijia Liu",
            "Conference on Uncertainty in Artificial Intelligence",
            2022,
            "2206.06257",
        ),
    ),
    "fast-advprop": (
        Paper(
            "mei2022fast",
            "Mei et al. 2022",
            "Fast AdvProp",
            "Jieru Mei, Yucheng Han, Yutong Bai, Yixiao Zhang, Yingwei Li, Xianhang Li, "
            "Alan Yuille, Cihang Xie",
            "International Conference on Learning Representations",
            2022,
            "2204.09838",
        ),
    ),
    "advprop": (
        Paper(
            "xie2020adversarial",
            "Xie et al. 2020",
            "Adversarial Examples Improve Image Recognition",
            "Cihang Xie, Mingxing Tan, Boqing Gong, Jiang Wang, Alan Yuille, Quoc V. Le",
            "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
            2020,
            "1911.09665",
        ),
    ),
}
