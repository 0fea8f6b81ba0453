"""The only door to compiled code: the trainer calls these functions and never asks where it runs.

    dispatch        which implementation runs on a device, and which faster ways are taken
    perturbation    the network's input at images + delta, and delta's step up the loss
    loss            cross-entropy and the sums of a pass
    layers          the stem's convolution and the last pooling
    norms           batch norm with what follows it
    block_ends      a residual block's last sum, or its norms and products, as one
    optimizers      LALR, SGD, the average of weights
    communication   the exchange of images and the codecs of gradients

`dispatch.backend` and `dispatch.FAST_PATHS` are not handed on: a second name for them would stay
what it was where the first is set anew. Formulas, bytes and numerics are told at the top of each
file in `freeadv_fast.kernels`.
"""

from freeadv_fast.kernels.batch_norm_statistics import Norm
from freeadv_fast.kernels.product_norm import Product
from freeadv_fast.ops.block_ends import block_sum, joined_norms, product_norm
from freeadv_fast.ops.communication import (
    codec_backend,
    decode_gradients,
    encode_gradients,
    encode_mean,
    exchange_backend,
    start_exchange,
)
from freeadv_fast.ops.layers import global_average, stem_convolution
from freeadv_fast.ops.loss import count_pass_, cross_entropy_sum_
from freeadv_fast.ops.norms import batch_norm_act, batch_norm_relu_pool, shared_norm_act
from freeadv_fast.ops.optimizers import (
    average_,
    average_table,
    lalr_,
    lalr_table,
    sgd_,
    sgd_table,
)
from freeadv_fast.ops.perturbation import ascend_normalize_, perturb_normalize, sign_ascent_

__all__ = [
    "Norm",
    "Product",
    "ascend_normalize_",
    "average_",
    "average_table",
    "batch_norm_act",
    "batch_norm_relu_pool",
    "block_sum",
    "codec_backend",
    "count_pass_",
    "cross_entropy_sum_",
    "decode_gradients",
    "encode_gradients",
    "encode_mean",
    "exchange_backend",
    "global_average",
    "joined_norms",
    "lalr_",
    "lalr_table",
    "perturb_normalize",
    "product_norm",
    "sgd_",
    "sgd_table",
    "shared_norm_act",
    "sign_ascent_",
    "start_exchange",
    "stem_convolution",
]
