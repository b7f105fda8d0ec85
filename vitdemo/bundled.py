"""What comes with the course, as paths below the data folder: shapes20, and the model that was trained on it."""

SHAPES20 = "shapes20"  # drawn, in the exact form of ILSVRC2012
VAL_TAR, DEVKIT = f"{SHAPES20}/shapes20_img_val.tar", f"{SHAPES20}/shapes20_devkit.tar.gz"
MODELS = {"vit_shapes20": f"{SHAPES20}/vit_shapes20"}  # name -> folder
CALIBRATIONS = {"vit_shapes20": f"{SHAPES20}/shapes20_calib.tar"}  # name of the model -> images for int8
