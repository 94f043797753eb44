"""gramjax"""
