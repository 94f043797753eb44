"""gramjax.models"""
