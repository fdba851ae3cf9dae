import torch
from vllm_aasd.kernels import align as align_op
class AlignmentStore:
    def __init__(self, num_blocks, block_size, top_k, device):
        self.top_k=top_k
        self.table=torch.full((num_blocks,block_size,1+2*top_k),-1,dtype=torch.int32,device=device)
        self._flat=self.table.flatten(0,1)
    def write(self, logits, token_ids, slot_mapping):
        align_op.align(logits, token_ids, slot_mapping, self._flat)
    def numpy(self): return self._flat.numpy()
    def read(self, token_ids, slots):
        e=self._flat[slots]; fresh=e[:,0]==token_ids; k=self.top_k
        return e[:,1:1+k], e[:,1+k:].contiguous().view(torch.float32)*fresh[:,None], fresh
