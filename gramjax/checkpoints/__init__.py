"""gramjax.checkpoints"""
