"""Kernels: one family a folder.  Importing this registers the shipped ones."""

from fxsparse.kernels.attention.attention import scaled_dot_product_attention
from fxsparse.kernels.bsr.linear import bsr_linear
from fxsparse.kernels.bsr.training import trainable_bsr_linear
from fxsparse.kernels.condensed.linear import condensed_linear
from fxsparse.kernels.csr.conv import csr_conv2d
from fxsparse.kernels.csr.conv_gradient import conv_gradient_at, conv_gradient_tiles
from fxsparse.kernels.csr.conv_inference import csr_conv_infer
from fxsparse.kernels.csr.linear import csr_linear
from fxsparse.kernels.csr.sampled import gradient_at
from fxsparse.kernels.csr.topology import position_change
from fxsparse.kernels.dense.conv import DENSE_CONV, MASKED_CONV
from fxsparse.kernels.dense.linear import DENSE, MASKED
from fxsparse.kernels.depthwise.conv import depthwise_conv
from fxsparse.kernels.lanes.conv import conv_lanes, csr_conv_lanes
from fxsparse.kernels.lanes.layout import from_lanes, join_lanes, to_lanes
from fxsparse.kernels.lanes.max_pool import max_pool_lanes
from fxsparse.kernels.lookup.linear import lookup_linear
from fxsparse.kernels.mkl.linear import mkl_linear
from fxsparse.kernels.narrow import NARROW
from fxsparse.kernels.nm.linear import nm_linear
from fxsparse.kernels.nm_lanes.linear import nm_lanes_linear
from fxsparse.kernels.onednn.conv import onednn_conv2d
from fxsparse.kernels.onednn.linear import onednn_linear
from fxsparse.kernels.pool.max_pool import max_pool2d
from fxsparse.kernels.semi_structured.linear import semi_structured_linear
from fxsparse.kernels.soft_topk.shift import soft_topk_shift
from fxsparse.kernels.strided.linear import strided_linear
from fxsparse.kernels.striped.linear import striped_linear
from fxsparse.kernels.top_mask.select import top_of_rows

__all__ = [
    "DENSE",
    "DENSE_CONV",
    "MASKED",
    "MASKED_CONV",
    "NARROW",
    "bsr_linear",
    "condensed_linear",
    "conv_gradient_at",
    "conv_gradient_tiles",
    "conv_lanes",
    "csr_conv2d",
    "csr_conv_infer",
    "csr_conv_lanes",
    "csr_linear",
    "depthwise_conv",
    "from_lanes",
    "gradient_at",
    "join_lanes",
    "lookup_linear",
    "max_pool2d",
    "max_pool_lanes",
    "mkl_linear",
    "nm_lanes_linear",
    "nm_linear",
    "onednn_conv2d",
    "onednn_linear",
    "position_change",
    "scaled_dot_product_attention",
    "semi_structured_linear",
    "soft_topk_shift",
    "strided_linear",
    "striped_linear",
    "to_lanes",
    "top_of_rows",
    "trainable_bsr_linear",
]
