"""Methods of federated LoRA, one object each: `compare.methods.registry` names them."""
