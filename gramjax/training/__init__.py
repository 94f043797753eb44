"""gramjax.training"""
