"""Batch norm, residual addition and ReLU in one call, in networks that others wrote.

On a GPU a ResNet in training spends most of its bytes on batch norm, addition and ReLU, each a pass
over the activations of its own. `ops.batch_norm_act` does the three in one. `fuse_batch_norms` puts
it into a network: batch norms become `FusedBatchNorm2d`, and where a class's `forward` calls
addition or ReLU itself the module becomes a twin, a subclass with the same computation in fused
calls. Twins share the tensors, the children and the hooks of what they stand for, so keys, the
order of parameters and the trees of `DualNetwork` are those of the plain network.

The output of a residual block is read twice, by the next block's first convolution and by its
shortcut. On a GPU twins read it as two tensors in the same memory, so that the kernels and not
autograd sum the two gradients. `torch.autograd.grad` with respect to such an output gives
the convolution's alone; a forward hook that calls `retain_grad` or `register_hook` gets the sum.

In a block that normalises first, the shortcut reads what its first norm reads, or what that writes.
On a GPU it gets an alias of that, so that the norm's kernels sum the two gradients. The block's
input has the whole gradient; a hook on a tensor inside the block has that of its own reader.

Such a block ends in a sum, which the next block's first norm reads. On a GPU in training
`ops.block_sum` takes that norm's statistics while it adds.

Where a block ends in a 1x1 convolution, `ops.product_norm` takes it together with its norm, the
addition and ReLU: on a GPU in training backward then never reads the convolution's output. The same
of a projection beside it, a 1x1 convolution with a norm of its own.

Where a block's shortcut ends in a batch norm of its own, that one joins the block's last: on a GPU
in training `ops.joined_norms` normalises both, and the normalised shortcut is never written.

The stem's batch norm takes over the max pooling behind its ReLU, too, and `nn.Identity` stands in
the pooling's place: `ops.batch_norm_relu_pool` never writes the activation between them. Its output
is read twice as a block's is.

The last pooling, a mean over all pixels, is that of `ops.global_average`, whose gradient comes in
the memory format that the last block's kernels take.

A layer or block is left alone unless its class, its activations and its optional parts are known:
the table at the end of `fuse` says which are.
"""
