def test_r(site, redis_url):
    site.write("from celery import Celery\napp = Celery('shop')\n@app.task(name='add')\ndef add(a,b): return a+b\n")
    site.set(broker_url=redis_url+"/0", result_backend=redis_url+"/1", key_prefix="shop:")
    with site.worker("--queues=default"):
        assert site.producer().send_task("add",(1,2)).get(timeout=10)==3
def test_q(site, rabbitmq, redis_url):
    url, ctl = rabbitmq
    site.write("from celery import Celery\napp = Celery('shop')\n@app.task(name='add')\ndef add(a,b): return a+b\n")
    site.set(broker_url=url, result_backend=redis_url+"/1", key_prefix="shop:")
    site.secret(broker_password="guest")
    with site.worker("--queues=default"):
        print(ctl("list_queues", "name", "type"))
        assert site.producer().send_task("add",(1,2)).get(timeout=10)==3
