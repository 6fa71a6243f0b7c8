export OMP_NUM_THREADS=1
while pgrep -f "qe.sh" >/dev/null; do sleep 1; done
P="nice -n 5 ../.venv/bin/python e3.py"
$P friedman,logistic,denoiser,autoencoder Ev .1,1 0
$P photo,friedman,denoiser,logistic PP .001,50 0
$P friedman,logistic,photo,autoencoder PP.k.7,PP.k1.4 .1 0
