"""gramjax.data"""
