export OMP_NUM_THREADS=1
while kill -0 $1 2>/dev/null; do sleep 1; done
P="nice -n 5 ../.venv/bin/python collect.py"
N=spiral,diabetes,patches,residual,factors,few_texts,contrast,mixture_adam
$P $N 1,0.5,2,0.25,4,0.125,8 0
$P lstm,char_lm_b8,gpt_other 1,0.5,2,0.25,4 0
$P gpt*2,regression*4,friedman*4,digits_mlp*4,mixture*5,photo*4 1,0.5,0.25,2,0.1,3 0
