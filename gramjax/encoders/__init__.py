"""gramjax.encoders"""
