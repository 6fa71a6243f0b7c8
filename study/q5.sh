export OMP_NUM_THREADS=1
P="nice -n 5 ../.venv/bin/python e3.py"
$P friedman,autoencoder,photo,denoiser,snippets,logistic J .1,1 0
$P digits_mlp,digits_conv,regression,recommender,batch_norm,mixture J .1,1 0
$P masked_lm,gru J,two .1,1 0
$P fine_tune,vision_transformer,char_lm,gpt J 1,.1 0
$P gpt,char_lm two .1,1 0
